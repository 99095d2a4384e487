// ropewalk._core: the compiled core for Python.  Each binding unpacks, checks everything a kernel will rely on,
// releases the GIL and calls; ropewalk/native/ is the public face and documents the operations.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "caches.hpp"
#include "checks.hpp"
#include "computing.hpp"
#include "layers.hpp"
#include "linears.hpp"
#include "ropewalk/operations.hpp"

namespace py = pybind11;

namespace ropewalk {
namespace {

// What indices a kernel follows is copied before it is checked: another thread may write to an array at any time.
template <class T>
std::vector<T> copied(const py::array& array, const char* name, int64_t size) {
  const T* data = contiguous<T>(array, name, {size});
  return {data, data + size};
}

void check_groups(const std::vector<int64_t>& starts, int64_t in_features) {
  const auto num_groups = starts.size() - 1;
  if (starts[0] != 0 || starts[num_groups] != in_features) {
    throw ShapeFailure("group_starts must begin with 0 and end with in_features (" + std::to_string(in_features) + ")");
  }
  for (size_t g = 0; g < num_groups; ++g) {
    if (starts[g] > starts[g + 1]) throw ShapeFailure("group_starts decreases after group " + std::to_string(g));
  }
}

void check_order(const std::vector<int32_t>& order) {
  const auto in_features = static_cast<int64_t>(order.size());
  std::vector<bool> seen(order.size(), false);
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] < 0 || order[i] >= in_features || seen[static_cast<size_t>(order[i])]) {
      throw ShapeFailure("order is not a permutation: entry " + std::to_string(i) + " is " + std::to_string(order[i]));
    }
    seen[static_cast<size_t>(order[i])] = true;
  }
}

std::shared_ptr<PackedGptq> pack_gptq(CpuRuntime& runtime, const py::array& qweight, int bits, bool planar,
                                      int64_t in_features, const py::array& scales, const py::array& zeros,
                                      const py::array& group_starts, const py::object& order,
                                      const py::object& bias) {
  if (bits < 2 || bits > 8) throw ShapeFailure("bits is " + std::to_string(bits) + "; accepted: 2 to 8");
  require(in_features > 0 && in_features <= kMostFeatures, "in_features is out of range");
  require(qweight.ndim() == 2 && scales.ndim() == 2, "qweight and scales must have two dimensions");
  const int64_t out_features = qweight.shape(1);
  const int64_t num_groups = scales.shape(0);
  require(out_features > 0 && num_groups > 0, "qweight or scales is empty");
  check_extent(qweight, "qweight");
  check_extent(scales, "scales");
  const int64_t word_rows = planar ? ceil_div(in_features, 32) * bits : ceil_div(in_features * bits, 32);
  PackedGptq::Source source{};
  source.qweight = contiguous<int32_t>(qweight, "qweight", {word_rows, out_features});
  source.in_features = in_features;
  source.out_features = out_features;
  source.bits = bits;
  source.planar = planar;
  source.scale_type = scales.itemsize() == 2 ? FloatType::f16 : FloatType::f32;
  source.scales = source.scale_type == FloatType::f16
                      ? static_cast<const void*>(contiguous<uint16_t>(scales, "scales", {num_groups, out_features}))
                      : contiguous<float>(scales, "scales", {num_groups, out_features});
  source.zeros = contiguous<uint8_t>(zeros, "zeros", {num_groups, out_features});
  source.num_groups = num_groups;
  const auto starts = copied<int64_t>(group_starts, "group_starts", num_groups + 1);
  check_groups(starts, in_features);
  source.group_starts = starts.data();
  std::vector<int32_t> sorted;
  if (!order.is_none()) {
    sorted = copied<int32_t>(array_of(order, "order"), "order", in_features);
    check_order(sorted);
    source.order = sorted.data();
  }
  py::array bias_array;
  if (!bias.is_none()) {
    bias_array = array_of(bias, "bias");
    source.bias = contiguous<float>(bias_array, "bias", {out_features});
  }
  const Computing computing(runtime);
  return std::make_shared<PackedGptq>(runtime, source);
}

bool run_round_rows(CpuRuntime& runtime, const py::array& weight, const std::string& type, int bits, bool half_scales,
                    py::array& words, py::array& scales, py::array& zeros) {
  const auto dense = dense_linear(weight, type, py::none());
  require(bits == 8 || bits == 4, "bits must be 8 or 4");
  RoundArgs args{};
  args.weight = dense->view.weight;
  args.type = dense->view.type;
  args.in_features = dense->view.in_features;
  args.out_features = dense->view.out_features;
  args.bits = bits;
  args.half_scales = half_scales;
  if (args.in_features * bits % 32 != 0) {
    throw ShapeFailure("weight has rows of " + std::to_string(args.in_features) + "; expected a multiple of " +
                       std::to_string(32 / bits));
  }
  const int64_t num_runs = ceil_div(args.in_features, bits == 8 ? kRoundRun<8> : kRoundRun<4>);
  args.words = writable_contiguous<int32_t>(words, "words", {args.in_features * bits / 32, args.out_features});
  args.scales = writable_contiguous<float>(scales, "scales", {num_runs, args.out_features});
  args.zeros = writable_contiguous<uint8_t>(zeros, "zeros", {num_runs, args.out_features});
  check_apart(words, "words", weight, "weight");
  check_apart(scales, "scales", weight, "weight");
  check_apart(zeros, "zeros", weight, "weight");
  check_apart(scales, "scales", words, "words");
  check_apart(zeros, "zeros", words, "words");
  check_apart(zeros, "zeros", scales, "scales");
  const Computing computing(runtime);
  return round_rows(runtime, args);
}

void run_rms_norm(CpuRuntime& runtime, const py::array& x, const py::array& weight, float epsilon, py::array& out) {
  require(weight.ndim() == 1 && weight.shape(0) > 0, "weight must have one dimension and at least one element");
  const int64_t size = weight.shape(0);
  const Heads<const float> heads = heads_of(x, "x", size);
  require(epsilon >= 0.0f && epsilon <= 1.0f, "epsilon must be in [0, 1]");
  RmsNormArgs args{};
  args.x = heads.data;
  args.row_stride = heads.row_stride;
  args.num_heads = heads.num_heads;
  args.size = size;
  args.weight = contiguous<float>(weight, "weight", {size});
  args.epsilon = epsilon;
  args.out = writable_contiguous<float>(out, "out", shape_of(x));
  check_apart(out, "out", x, "x");
  check_apart(out, "out", weight, "weight");
  const Computing computing(runtime);
  rms_norm(runtime, args, heads.num_rows);
}

void run_rotate(CpuRuntime& runtime, py::array& x, const py::array& cos, const py::array& sin) {
  require(x.ndim() == 3 && cos.ndim() == 2, "x must be [T, H, D] and cos, sin [T, R / 2]");
  check_extent(cos, "cos");
  const Heads<float> heads = writable_heads(x, "x", x.shape(2));
  RotateArgs args{};
  args.x = heads.data;
  args.row_stride = heads.row_stride;
  args.num_heads = heads.num_heads;
  args.head_dim = x.shape(2);
  args.half = cos.shape(1);
  require(2 * args.half <= args.head_dim, "cos has more than D / 2 columns");
  args.cos = contiguous<float>(cos, "cos", {heads.num_rows, args.half});
  args.sin = contiguous<float>(sin, "sin", {heads.num_rows, args.half});
  check_apart(x, "x", cos, "cos");
  check_apart(x, "x", sin, "sin");
  const Computing computing(runtime);
  rotate(runtime, args, heads.num_rows);
}

void run_layer_norm(CpuRuntime& runtime, const py::array& x, const py::array& weight, const py::object& bias,
                    float epsilon, py::array& out) {
  require((x.ndim() == 2 || x.ndim() == 3) && x.shape(x.ndim() - 1) > 0, "x must be [T, C] or [T, H, C]");
  const int64_t size = x.shape(x.ndim() - 1);
  const Heads<const float> heads = heads_of(x, "x", size);
  require(epsilon >= 0.0f && epsilon <= 1.0f, "epsilon must be in [0, 1]");
  LayerNormArgs args{};
  args.x = heads.data;
  args.row_stride = heads.row_stride;
  args.num_heads = heads.num_heads;
  args.size = size;
  args.weight = norm_of(weight, "weight", heads.num_heads, size, args.weight_stride);
  args.epsilon = epsilon;
  args.out = writable_contiguous<float>(out, "out", shape_of(x));
  check_apart(out, "out", x, "x");
  check_apart(out, "out", weight, "weight");
  py::array bias_array;
  if (!bias.is_none()) {
    bias_array = array_of(bias, "bias");
    args.bias = norm_of(bias_array, "bias", heads.num_heads, size, args.bias_stride);
    check_apart(out, "out", bias_array, "bias");
  }
  const Computing computing(runtime);
  layer_norm(runtime, args, heads.num_rows);
}

// x: [T, I], or [T, 2 * I] for a gate.
void run_activate(CpuRuntime& runtime, const py::array& x, const std::string& activation, bool gated, py::array& out) {
  require(out.ndim() == 2, "out must be [T, I]");
  check_extent(out, "out");
  ActivateArgs args{};
  args.size = out.shape(1);
  args.x_stride = (gated ? 2 : 1) * args.size;
  args.gated = gated;
  args.activation = activation_named(activation);
  const char* name = gated ? "gate_up" : "x";
  args.x = contiguous<float>(x, name, {out.shape(0), args.x_stride});
  args.out = writable_contiguous<float>(out, "out", shape_of(out));
  check_apart(out, "out", x, name);
  const int64_t num_rows = out.shape(0);
  const Computing computing(runtime);
  activate(runtime, args, num_rows);
}

void run_add(CpuRuntime& runtime, py::array& x, const py::array& y, float weight) {
  require(x.ndim() == 2, "x must be [T, C]");
  AddArgs args{};
  args.x = writable_contiguous<float>(x, "x", shape_of(x));
  args.y = contiguous<float>(y, "y", shape_of(x));
  check_apart(x, "x", y, "y");
  args.weight = weight;
  args.size = x.shape(1);
  const int64_t num_rows = x.shape(0);
  const Computing computing(runtime);
  add(runtime, args, num_rows);
}

// `table` is taken as a dense weight, so that a table that is also the head is described once.
float run_probe_read(CpuRuntime& runtime, const py::array& floats) {
  require(floats.ndim() == 1 && floats.shape(0) % (4 * kLanes) == 0, "floats must have one dimension, a multiple of 64");
  const float* data = contiguous<float>(floats, "floats", {floats.shape(0)});
  const Computing computing(runtime);
  return probe_read(runtime, data, floats.shape(0));
}

int64_t run_probe_products(CpuRuntime& runtime, const std::string& kind, int64_t steps) {
  if (kind != "int8" && kind != "f32") throw ShapeFailure("kind is '" + kind + "'; accepted: 'int8', 'f32'");
  require(steps > 0 && steps <= kMostFeatures, "steps is out of range");
  const Computing computing(runtime);
  return probe_products(runtime, kind == "int8" ? ProbeKind::int8 : ProbeKind::f32, steps);
}

void run_embed(CpuRuntime& runtime, const DenseLinear& table, const py::array& token_ids, py::array& out) {
  require(token_ids.ndim() == 1, "token_ids must have one dimension");
  const int64_t num_rows = token_ids.shape(0);
  EmbedArgs args{};
  args.table = table.view.weight;
  args.table_type = table.view.type;
  args.size = table.view.in_features;
  const auto ids = copied<int64_t>(token_ids, "token_ids", num_rows);
  for (size_t t = 0; t < ids.size(); ++t) {
    if (ids[t] >= 0 && ids[t] < table.view.out_features) continue;
    throw ShapeFailure("token id " + std::to_string(ids[t]) + " at position " + std::to_string(t) +
                       " is outside a table of " + std::to_string(table.view.out_features));
  }
  args.token_ids = ids.data();
  args.out = writable_contiguous<float>(out, "out", {num_rows, args.size});
  check_apart(out, "out", table.weight, "the table");
  const Computing computing(runtime);
  embed(runtime, args, num_rows);
}

// The memory as an array that keeps it alive.
py::array bytes_of(const std::shared_ptr<AlignedBytes>& memory) {
  return py::array(py::dtype::of<uint8_t>(), Shape{memory->size()}, memory->as<uint8_t>(), py::cast(memory));
}

std::shared_ptr<AlignedBytes> aligned_bytes(int64_t size) {
  require(size >= 0, "size is negative");
  return std::make_shared<AlignedBytes>(size);
}

// Who computes may be waiting for the GIL.
int64_t bytes_of_scratch(CpuRuntime& runtime) {
  const py::gil_scoped_release release;
  return runtime.scratch_bytes();
}

// A result that goes back to the runtime's spare memory when Python frees it.
struct Lent {
  std::shared_ptr<SpareMemory> owner;
  AlignedBytes memory;
  ~Lent() { owner->give(std::move(memory)); }
};

template <class T>
py::array lent_array(const std::shared_ptr<SpareMemory>& spare, const Shape& shape, int64_t num_bytes) {
  std::unique_ptr<Lent> lent(new Lent{spare, spare->take(num_bytes)});
  T* data = lent->memory.as<T>();
  const py::capsule owner(lent.get(), [](void* p) { delete static_cast<Lent*>(p); });
  lent.release();
  return py::array(py::dtype::of<T>(), shape, data, owner);
}

py::array empty_result(const CpuRuntime& runtime, int64_t num_rows, int64_t num_columns) {
  if (num_rows < 0 || num_columns < 0 || num_rows > kMostFeatures || num_columns > kMostFeatures) {
    throw ShapeFailure("a result of " + describe(Shape{num_rows, num_columns}) + " is out of range");
  }
  const auto bytes = num_rows * num_columns * static_cast<int64_t>(sizeof(float));
  return lent_array<float>(runtime.spare(), {num_rows, num_columns}, bytes);
}

py::array spare_bytes(const std::shared_ptr<SpareMemory>& spare, int64_t size) {
  require(size >= 0 && size <= int64_t{1} << 60, "size is out of range");
  return lent_array<uint8_t>(spare, {size}, size);
}

void translate(std::exception_ptr pending) {
  const auto raise = [](const char* name, const std::exception& error) {
    py::set_error(py::module_::import("ropewalk.errors").attr(name), error.what());
  };
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const ShapeFailure& error) {
    raise("ShapeError", error);
  } catch (const std::invalid_argument& error) {
    raise("NativeError", error);
  }
}

}  // namespace
}  // namespace ropewalk

PYBIND11_MODULE(_core, m) {
  using namespace ropewalk;
  m.doc() = "The compiled core of ropewalk; use ropewalk.native.";
  py::register_local_exception_translator(&translate);

  m.attr("LIMITS") = py::dict(py::arg("FEATURES") = kMostFeatures, py::arg("HEADS") = kMostHeads,
                              py::arg("HEAD_DIM") = kMostHeadDim, py::arg("POSITIONS") = kMostPositions,
                              py::arg("EXPERTS") = kMostExperts, py::arg("THREADS") = kMostThreads);

  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const KernelTable* table : available_tables()) names.emplace_back(table->name);
    return names;
  });

  py::class_<CpuRuntime>(m, "Runtime")
      .def(py::init<const std::string&, int>(), py::arg("isa"), py::arg("threads"))
      .def_property_readonly("isa", [](const CpuRuntime& runtime) { return runtime.table().name; })
      .def_property_readonly("threads", [](CpuRuntime& runtime) { return runtime.pool().num_threads(); })
      .def("empty", &empty_result, py::arg("num_rows"), py::arg("num_columns"))
      .def_property_readonly("scratch_bytes", &bytes_of_scratch);

  py::class_<AlignedBytes, std::shared_ptr<AlignedBytes>>(m, "AlignedBytes")
      .def(py::init(&aligned_bytes), py::arg("size"))
      .def("array", &bytes_of);

  py::class_<SpareMemory, std::shared_ptr<SpareMemory>>(m, "SpareMemory")
      .def(py::init<>())
      .def("take", &spare_bytes, py::arg("size"))
      .def_property_readonly("num_bytes", &SpareMemory::num_bytes);

  py::class_<PackedGptq, std::shared_ptr<PackedGptq>>(m, "PackedGptq")
      .def_property_readonly("num_bytes", &PackedGptq::num_bytes);
  py::class_<DenseLinear, std::shared_ptr<DenseLinear>>(m, "DenseLinear")
      .def_property_readonly("in_features", [](const DenseLinear& d) { return d.view.in_features; })
      .def_property_readonly("num_bytes", [](const DenseLinear& d) { return d.weight.nbytes(); });
  m.def("pack_gptq", &pack_gptq, py::arg("runtime"), py::arg("qweight"), py::arg("bits"), py::arg("planar"),
        py::arg("in_features"), py::arg("scales"), py::arg("zeros"), py::arg("group_starts"), py::arg("order"),
        py::arg("bias"));
  m.def("round_rows", &run_round_rows, py::arg("runtime"), py::arg("weight"), py::arg("type"), py::arg("bits"),
        py::arg("half_scales"), py::arg("words"), py::arg("scales"), py::arg("zeros"));
  m.def("dense_linear", &dense_linear, py::arg("weight"), py::arg("type"), py::arg("bias"));

  py::class_<LowRank>(m, "LowRank")
      .def(py::init<const py::array&, const py::object&, int64_t, const std::string&,
                    const std::vector<LowRank::Part>&>(),
           py::arg("a"), py::arg("scales"), py::arg("in_features"), py::arg("type"), py::arg("parts"))
      .def("add", &LowRank::add, py::arg("runtime"), py::arg("x"), py::arg("out"))
      .def_property_readonly("num_bytes", &LowRank::num_bytes);

  py::class_<LinearGroup>(m, "LinearGroup")
      .def(py::init<std::vector<py::object>>(), py::arg("parts"))
      .def("run", &LinearGroup::run, py::arg("runtime"), py::arg("compute"), py::arg("x"), py::arg("out"),
           py::arg("change"))
      .def_property_readonly("in_features", &LinearGroup::in_features)
      .def_property_readonly("out_features", &LinearGroup::out_features);

  py::class_<KvCache, std::shared_ptr<KvCache>>(m, "KvCache")
      .def(py::init(&new_kv_cache), py::arg("num_heads"), py::arg("head_dim"), py::arg("capacity"), py::arg("type"))
      .def_property_readonly("capacity", &KvCache::capacity)
      .def_property_readonly("length", &KvCache::length)
      .def_property_readonly("num_bytes", &KvCache::num_bytes);

  py::class_<Page, std::shared_ptr<Page>>(m, "Page").def("array", &page_bytes);
  py::class_<PagePool, std::shared_ptr<PagePool>>(m, "PagePool")
      .def(py::init(&new_page_pool), py::arg("num_heads"), py::arg("head_dim"), py::arg("type"), py::arg("num_bytes"),
           py::arg("recent"))
      .def_property_readonly("num_bytes", &PagePool::num_bytes)
      .def_property_readonly("used_bytes", &PagePool::used_bytes)
      .def_property_readonly("instance_bytes", [](const PagePool& pool) { return pool.format().instance_bytes(); })
      .def_property_readonly("recent_instance_bytes",
                             [](const PagePool& pool) { return pool.recent_format().instance_bytes(); })
      .def("take", &take_page, py::arg("num_instances"), py::arg("recent"))
      .def("copy", &copy_page, py::arg("page"));

  py::class_<BoundExperts, std::shared_ptr<BoundExperts>>(m, "Experts")
      .def(py::init<int64_t, int64_t, int64_t, py::object>(), py::arg("num_experts"), py::arg("size"), py::arg("inner"),
           py::arg("fetch"))
      .def("put", &BoundExperts::put, py::arg("number"), py::arg("gate_up"), py::arg("down"))
      .def("drop", &BoundExperts::drop, py::arg("number"));

  py::class_<BoundStep>(m, "Step")
      .def(py::init<py::array, const py::array&, const py::array&, const std::vector<BoundStep::Span>&>(),
           py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("spans"));
  py::class_<BoundLayer>(m, "Layer")
      .def(py::init<std::vector<int64_t>, const std::string&>(), py::arg("widths"), py::arg("compute"))
      .def("rms_norm", &BoundLayer::rms_norm, py::arg("x"), py::arg("weight"), py::arg("epsilon"), py::arg("out"))
      .def("layer_norm", &BoundLayer::layer_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("epsilon"),
           py::arg("out"))
      .def("linear", &BoundLayer::linear, py::arg("x"), py::arg("weight"), py::arg("out"))
      .def("rotate", &BoundLayer::rotate, py::arg("x"), py::arg("table"))
      .def("append", &BoundLayer::append, py::arg("k"), py::arg("v"))
      .def("attend", &BoundLayer::attend, py::arg("q"), py::arg("out"), py::arg("window"), py::arg("scale"),
           py::arg("softcap"))
      .def("activate", &BoundLayer::activate, py::arg("x"), py::arg("activation"), py::arg("out"))
      .def("gate", &BoundLayer::gate, py::arg("gate_up"), py::arg("activation"), py::arg("out"))
      .def("sigmoid_mul", &BoundLayer::sigmoid_mul, py::arg("x"), py::arg("gate"), py::arg("out"))
      .def("route", &BoundLayer::route, py::arg("logits"), py::arg("top_k"), py::arg("normalised"), py::arg("out"))
      .def("experts", &BoundLayer::experts, py::arg("x"), py::arg("routes"), py::arg("weight"), py::arg("activation"),
           py::arg("out"))
      .def("add_residual", &BoundLayer::add_residual, py::arg("y"), py::arg("scale"))
      .def("finish", &BoundLayer::finish)
      .def("run", &BoundLayer::run, py::arg("runtime"), py::arg("step"), py::arg("instance"), py::arg("weight"),
           py::arg("changes"));

  m.def("rms_norm", &run_rms_norm, py::arg("runtime"), py::arg("x"), py::arg("weight"), py::arg("epsilon"),
        py::arg("out"));
  m.def("rotate", &run_rotate, py::arg("runtime"), py::arg("x"), py::arg("cos"), py::arg("sin"));
  m.def("layer_norm", &run_layer_norm, py::arg("runtime"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("epsilon"), py::arg("out"));
  m.def("activate", &run_activate, py::arg("runtime"), py::arg("x"), py::arg("activation"), py::arg("gated"),
        py::arg("out"));
  m.def("add", &run_add, py::arg("runtime"), py::arg("x"), py::arg("y"), py::arg("weight"));
  m.def("embed", &run_embed, py::arg("runtime"), py::arg("table"), py::arg("token_ids"), py::arg("out"));
  m.def("probe_read", &run_probe_read, py::arg("runtime"), py::arg("floats"));
  m.def("probe_products", &run_probe_products, py::arg("runtime"), py::arg("kind"), py::arg("steps"));
  m.def("append", &run_append, py::arg("runtime"), py::arg("cache"), py::arg("k"), py::arg("v"), py::arg("start"));
  m.def("attend", &run_attend, py::arg("runtime"), py::arg("q"), py::arg("cache"), py::arg("start"),
        py::arg("window"), py::arg("scale"), py::arg("softcap"), py::arg("compute"), py::arg("out"));
  m.def("move_rows", &run_move_rows, py::arg("runtime"), py::arg("source"), py::arg("source_start"), py::arg("target"),
        py::arg("target_start"), py::arg("num_rows"), py::arg("cos"), py::arg("sin"), py::arg("tables"));
}
