// Vector verbs in portable C++: a row of 16 lanes is an array, and the compiler's own vectoriser does what it can.
#include "../generic/table.inl.hpp"
#include "ropewalk/tables.hpp"

namespace ropewalk::scalar {
namespace {

float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

// IEEE binary16 to binary32, exact; subnormals are scaled by 2^-24.
float f16_to_f32(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 0x1f;
  const uint32_t mantissa = half & 0x3ff;
  if (exponent == 0x1f) return bits_to_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return bits_to_float(sign | float_to_bits(static_cast<float>(mantissa) * 0x1p-24f));
  return bits_to_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Round to nearest even, as the F16C instructions do: subnormals and overflow included.
uint16_t f32_to_f16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

struct Verbs {
  struct F32 {
    float lane[16];
  };
  static constexpr int kInt8Rows = 1;
  static constexpr int kInt8Tiles = 1;
  static constexpr int kExactRows = 1;
  static constexpr int kExactTiles = 1;
  static constexpr int kLowRankRows = 1;
  static constexpr int kLowRankTiles = 1;
  static constexpr int kDenseRows = 1;
  static constexpr int kAttendRows = 1;
  static constexpr int kCodeRows = 1;
  static constexpr bool kBf16Pairs = false;

  template <class Function>
  static F32 each(Function function) {
    F32 result;
    for (int i = 0; i < 16; ++i) result.lane[i] = function(i);
    return result;
  }

  static F32 zero() { return broadcast(0.0f); }
  static F32 broadcast(float x) { return each([&](int) { return x; }); }
  static F32 load(const float* p) { return each([&](int i) { return p[i]; }); }
  static void store(float* p, F32 v) {
    for (int i = 0; i < 16; ++i) p[i] = v.lane[i];
  }
  static F32 load_partial(const float* p, int64_t n) { return each([&](int i) { return i < n ? p[i] : 0.0f; }); }
  static void store_partial(float* p, F32 v, int64_t n) {
    for (int i = 0; i < 16 && i < n; ++i) p[i] = v.lane[i];
  }
  static F32 load_f16(const uint16_t* p) { return each([&](int i) { return f16_to_f32(p[i]); }); }
  static void store_f16(uint16_t* p, F32 v) {
    for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(v.lane[i]);
  }
  static F32 load_bf16(const uint16_t* p) {
    return each([&](int i) { return bits_to_float(static_cast<uint32_t>(p[i]) << 16); });
  }
  static F32 load_u8(const uint8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
  static F32 load_i8(const int8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
  static F32 gather_or_zero(const float* base, const int32_t* index) {
    return each([&](int i) { return index[i] < 0 ? 0.0f : base[index[i]]; });
  }
  static F32 add(F32 a, F32 b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static F32 sub(F32 a, F32 b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
  static F32 mul(F32 a, F32 b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static F32 div(F32 a, F32 b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
  // A NaN comes through from the second argument, as with the x86 instructions.
  static F32 min(F32 a, F32 b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static F32 max(F32 a, F32 b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
  static F32 abs(F32 a) { return each([&](int i) { return a.lane[i] < 0.0f ? -a.lane[i] : a.lane[i]; }); }
  static F32 fma(F32 a, F32 b, F32 c) { return add(mul(a, b), c); }
  static F32 fnma(F32 a, F32 b, F32 c) { return sub(c, mul(a, b)); }
  // |a| < 2^23: moved away from zero by 2^23 and back, it is rounded to nearest even.
  static F32 round(F32 a) {
    return each([&](int i) {
      const float power = a.lane[i] < 0.0f ? -8388608.0f : 8388608.0f;
      return (a.lane[i] + power) - power;
    });
  }
  static F32 mul_pow2(F32 a, F32 n) {
    return each([&](int i) {
      return a.lane[i] * bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23);
    });
  }
  static float sqrt(float x) { return __builtin_sqrtf(x); }
  static float first(F32 a) { return a.lane[0]; }
  // The same tree as the vector versions: halves, quarters, pairs.
  static float reduce_add(F32 a) {
    for (int width = 8; width != 0; width /= 2) {
      for (int i = 0; i < width; ++i) a.lane[i] += a.lane[i + width];
    }
    return a.lane[0];
  }
  static float reduce_max(F32 a) {
    float largest = a.lane[0];
    for (int i = 1; i < 16; ++i) largest = a.lane[i] > largest ? a.lane[i] : largest;
    return largest;
  }
  // Lanes begin <= i < end of `a`, the others of `b`.
  static F32 select_range(F32 a, F32 b, int64_t begin, int64_t end) {
    return each([&](int i) { return begin <= i && i < end ? a.lane[i] : b.lane[i]; });
  }
  static void store_int8(int8_t* p, F32 v) {
    const F32 rounded = round(v);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(rounded.lane[i]);
  }
  static void store_int16(int16_t* p, F32 v) {
    const F32 rounded = round(v);
    for (int i = 0; i < 16; ++i) {
      const bool fits = rounded.lane[i] >= -32768.0f && rounded.lane[i] <= 32767.0f;  // not a NaN
      p[i] = fits ? static_cast<int16_t>(rounded.lane[i]) : int16_t{-32768};
    }
  }
  // (a, b) -> (a + b, a - b) for lanes kDistance apart.
  template <int kDistance>
  static F32 butterfly(F32 a) {
    return each([&](int i) {
      return (i & kDistance) == 0 ? a.lane[i] + a.lane[i + kDistance] : a.lane[i - kDistance] - a.lane[i];
    });
  }
  static void prefetch(const void*) {}
  static void prefetch_far(const void*) {}

  struct Codes {  // 16 lanes of 4 codes
    uint8_t byte[64];
  };
  using Quad = const int8_t*;  // 4 activations, the same for every lane
  static Quad broadcast_quad(const int8_t* values) { return values; }
  static F32 codes_to_f32(const Codes& codes, int j) {
    return each([&](int i) { return static_cast<float>(codes.byte[i * 4 + j]); });
  }
  // Dot products of unsigned codes with signed activations over one block of 32 rows.
  template <int kBits>
  struct Dot {
    struct Sum {
      int32_t lane[16];
    };
    static Sum zero() { return Sum{}; }
    static Sum begin(int32_t start) {
      Sum sum;
      for (auto& lane : sum.lane) lane = start;
      return sum;
    }
    // kWidth bits of a byte of a line.
    template <int kWidth>
    static int field(const uint8_t* byte, int from) {
      return *byte >> from & ((1 << kWidth) - 1);
    }
    // Of a byte of quad i in the order of a product (rows 4q.., 16 + 4q.., then the next q); block: from that byte on.
    static int code(const uint8_t* block, int i) {
      if constexpr (kBits == 2) return field<2>(block + i / 4 * 64, i % 4 * 2);
      if constexpr (kBits == 3) {
        if (i < 6) return field<3>(block + i / 2 * 64, i % 2 * 3);
        return field<2>(block + (i - 6) * 64, 6) | field<1>(block + 2 * 64, i) << 2;
      }
      if constexpr (kBits == 4) return field<4>(block + i / 2 * 64, i % 2 * 4);
      if constexpr (kBits == 6) {
        return field<4>(block + i / 2 * 64, i % 2 * 4) | field<2>(block + (4 + i / 4) * 64, i % 4 * 2) << 4;
      }
      if constexpr (kBits == 8) return block[(i / 2 + i % 2 * 4) * 64];
    }
    static Codes quad_of(const uint8_t* block, int quad) {
      Codes codes;
      for (int byte = 0; byte < 64; ++byte) codes.byte[byte] = static_cast<uint8_t>(code(block + byte, quad));
      return codes;
    }
    static Codes first_half(const uint8_t* block, int quad) { return quad_of(block, 2 * quad); }
    static Codes second_half(const uint8_t* block, int quad) { return quad_of(block, 2 * quad + 1); }
    static Sum add(Sum sum, const Codes& codes, Quad values) {
      for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 4; ++j) sum.lane[i] += static_cast<int32_t>(codes.byte[i * 4 + j]) * values[j];
      }
      return sum;
    }
    static F32 to_f32(const Sum& sum) { return each([&](int i) { return static_cast<float>(sum.lane[i]); }); }
    static F32 end(const Sum& sum, int32_t) { return to_f32(sum); }
  };

  struct Words {  // 16 lanes of 2 words: two keys of a value, or 32 weights
    int16_t word[32];
  };
  struct PairSum {
    int32_t lane[16];
  };
  static Words load_words(const int16_t* p) {
    Words words;
    __builtin_memcpy(words.word, p, sizeof words);
    return words;
  }
  static void store_words(int16_t* p, const Words& a) { __builtin_memcpy(p, a.word, sizeof a); }
  // a * b / 2^15, rounded half up.
  static Words mul_words(const Words& a, const Words& b) {
    Words product;
    for (int i = 0; i < 32; ++i) product.word[i] = static_cast<int16_t>((a.word[i] * b.word[i] + 0x4000) >> 15);
    return product;
  }
  static PairSum pair_zero() { return PairSum{}; }
  static PairSum add_pair(PairSum sum, const Words& words, const int16_t* two) {
    for (int i = 0; i < 16; ++i) {
      const int pair = words.word[2 * i] * two[0] + words.word[2 * i + 1] * two[1];
      sum.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(sum.lane[i]) + static_cast<uint32_t>(pair));
    }
    return sum;
  }
  static PairSum add_sums(PairSum a, const PairSum& b) {
    for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static F32 pair_to_f32(const PairSum& sum) { return each([&](int i) { return static_cast<float>(sum.lane[i]); }); }
  static F32 word_to_f32(const Words& words, int which) {
    return each([&](int i) { return static_cast<float>(words.word[2 * i + which]); });
  }

  // Codes of 32 keys in 16 dims as pairs of neighbouring keys, kPerLine of them to a line.
  template <int kBits>
  struct Pairs {
    static constexpr int kPerLine = kBits == 8 ? 2 : 4;
    static constexpr int kLines = 16 / kPerLine;
    static int word(const uint8_t* line, int i) { return line[2 * i] | line[2 * i + 1] << 8; }
    static void load(const uint8_t* block, int index, Words (&words)[kPerLine]) {
      for (int pair = 0; pair < kPerLine; ++pair) {
        for (int i = 0; i < 32; ++i) {
          const int all = word(block + index * 64, i);
          int code = kBits == 8 ? all >> 8 * pair & 0xff : all >> 4 * pair & 0x0f;
          // Of 6 bits: the upper bits of the pairs of two lines, 2 bits each.
          if (kBits == 6) code |= (word(block + (4 + index / 2) * 64, i) >> 2 * (index % 2 * 4 + pair) & 3) << 4;
          words[pair].word[i] = static_cast<int16_t>(code);
        }
      }
    }
  };
};

constexpr KernelTable kTable = make_table<Verbs>("scalar");

}  // namespace

const KernelTable& kernel_table() noexcept { return kTable; }

}  // namespace ropewalk::scalar
