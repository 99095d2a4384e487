// llama.cpp as a peer of depth.py and experts.py: holds one context and does what the lines of its standard input say.
//
//   at_depth MODEL.gguf THREADS TYPE_K TYPE_V CONTEXT
//
//   fill N         the cache holds N positions: copies of the keys and values of one short prompt, shifted into place
//   run ROWS STEP  ROWS tokens, STEP at a time, which are forgotten again; answers with the seconds. They differ, as
//                  varied_ids of filled_caches.py has them: alike, all would choose the same experts of a mixture
//   score FILE K   the int32 token ids of a file as one text, read STEP = K at a time; answers with the sum of the
//                  negative log-likelihoods of all tokens after the first
//
// Built against a llama.cpp tree that was built with static libraries:
//
//   g++ -O2 -std=c++17 -I TREE/include -I TREE/ggml/include at_depth.cpp -o at_depth TREE/build/src/libllama.a \
//       TREE/build/ggml/src/libggml.a TREE/build/ggml/src/libggml-cpu.a TREE/build/ggml/src/libggml-base.a \
//       -fopenmp -lpthread -ldl
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "llama.h"

namespace {

constexpr int kPiece = 512;  // positions that are computed; the others are copies of them
constexpr llama_token kToken = 300;
constexpr int64_t kStride = 7919;  // from one token of a run to the next, modulo the vocabulary

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "at_depth: %s\n", what.c_str());
  std::exit(1);
}

ggml_type type_named(const std::string& name) {
  for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
    const char* known = ggml_type_name(static_cast<ggml_type>(type));
    if (known != nullptr && name == known) return static_cast<ggml_type>(type);
  }
  fail("no type " + name);
}

class Peer {
 public:
  Peer(const char* path, int threads, ggml_type keys, ggml_type values, int context) {
    llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    llama_backend_init();
    model_ = llama_model_load_from_file(path, llama_model_default_params());
    if (model_ == nullptr) fail(std::string("cannot load ") + path);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<uint32_t>(context);
    params.n_batch = params.n_ubatch = kPiece;
    params.n_seq_max = 2;
    params.kv_unified = true;
    params.n_threads = params.n_threads_batch = threads;
    params.type_k = keys;
    params.type_v = values;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    context_ = llama_init_from_model(model_, params);
    if (context_ == nullptr) fail("no context of that size");
    memory_ = llama_get_memory(context_);
  }

  void fill(int length) {
    if (length < 0) fail("cannot hold " + std::to_string(length) + " positions");
    llama_memory_clear(memory_, true);
    length_ = 0;
    if (length == 0) return;
    append(std::vector<llama_token>(std::min(kPiece, length), kToken), false);
    std::vector<uint8_t> piece(llama_state_seq_get_size(context_, 0));
    llama_state_seq_get_data(context_, piece.data(), piece.size(), 0);
    while (length_ < length) {
      if (llama_state_seq_set_data(context_, piece.data(), piece.size(), 1) == 0) fail("the cache is full");
      llama_memory_seq_rm(memory_, 1, length - length_, -1);
      llama_memory_seq_add(memory_, 1, 0, -1, length_);
      llama_memory_seq_cp(memory_, 1, 0, -1, -1);
      llama_memory_seq_rm(memory_, 1, -1, -1);
      length_ += std::min(kPiece, length - length_);
    }
    run(1, 1);  // the shift happens before the next token
  }

  double run(int rows, int step) {
    if (rows < 1 || step < 1) fail("run takes numbers from 1 on");
    const int before = length_;
    const auto started = std::chrono::steady_clock::now();
    for (int done = 0; done < rows; done += step) {
      append(varied(done, std::min(step, rows - done)), false);
      llama_get_logits_ith(context_, -1);
    }
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - started;
    llama_memory_seq_rm(memory_, 0, before, -1);
    length_ = before;
    return taken.count();
  }

  double score(const std::vector<llama_token>& ids, int step) {
    if (ids.empty() || step < 1) fail("score takes a file of token ids, and a number from 1 on");
    fill(0);
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    const int num = static_cast<int>(ids.size());
    double sum = 0;
    for (int first = 0; first < num; first += step) {
      const int count = std::min(step, num - first);
      append({ids.begin() + first, ids.begin() + first + count}, true);
      for (int row = 0; row < count && first + row + 1 < num; ++row) {
        sum -= log_probability(llama_get_logits_ith(context_, row), vocab, ids[first + row + 1]);
      }
    }
    fill(0);
    return sum;
  }

 private:
  std::vector<llama_token> varied(int first, int count) const {
    const int64_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(model_));
    if (vocab <= kToken) fail("the vocabulary is too small");
    std::vector<llama_token> ids(static_cast<size_t>(count));
    for (int i = 0; i < count; ++i) {
      ids[static_cast<size_t>(i)] = static_cast<llama_token>(kToken + (first + i) * kStride % (vocab - kToken));
    }
    return ids;
  }

  static double log_probability(const float* logits, int vocab, llama_token token) {
    const double largest = *std::max_element(logits, logits + vocab);
    const double total = std::accumulate(logits, logits + vocab, 0.0,
                                         [&](double part, float x) { return part + std::exp(x - largest); });
    return logits[token] - largest - std::log(total);
  }

  void append(const std::vector<llama_token>& ids, bool all_logits) {
    llama_batch batch = llama_batch_init(static_cast<int32_t>(ids.size()), 0, 1);
    batch.n_tokens = static_cast<int32_t>(ids.size());
    for (int i = 0; i < batch.n_tokens; ++i) {
      batch.token[i] = ids[i];
      batch.pos[i] = length_ + i;
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = all_logits || i + 1 == batch.n_tokens;
    }
    if (llama_decode(context_, batch) != 0) fail("a batch could not be computed");
    length_ += batch.n_tokens;
    llama_batch_free(batch);
  }

  llama_model* model_;
  llama_context* context_;
  llama_memory_t memory_;
  int length_ = 0;
};

std::vector<llama_token> read_ids(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("cannot open " + path);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
  std::vector<llama_token> ids(bytes.size() / sizeof(llama_token));
  std::copy(bytes.begin(), bytes.begin() + static_cast<long>(ids.size() * sizeof(llama_token)),
            reinterpret_cast<char*>(ids.data()));
  return ids;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) fail("MODEL.gguf THREADS TYPE_K TYPE_V CONTEXT");
  Peer peer(argv[1], std::atoi(argv[2]), type_named(argv[3]), type_named(argv[4]), std::atoi(argv[5]));
  std::cout << "ready" << std::endl;
  std::string what;
  while (std::cin >> what) {
    if (what == "fill") {
      int length = 0;
      std::cin >> length;
      peer.fill(length);
      std::cout << "done" << std::endl;
    } else if (what == "run") {
      int rows = 0, step = 0;
      std::cin >> rows >> step;
      std::cout << peer.run(rows, step) << std::endl;
    } else if (what == "score") {
      std::string path;
      int step = 0;
      std::cin >> path >> step;
      std::cout.precision(12);
      std::cout << peer.score(read_ids(path), step) << std::endl;
    } else {
      fail("cannot " + what);
    }
  }
}
