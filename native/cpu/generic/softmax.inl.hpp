// Scores into weights, page by page: the online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), whose weights
// are relative to the largest score so far, or for coded values to the largest of the page.
#pragma once

#include "attention_tile.inl.hpp"
#include "functions.inl.hpp"

namespace ropewalk {

// tile.scores of some rows over a page: c * tanh(score / c).
template <class V>
void cap_scores(const AttendTile& tile, const PageRows& rows, float cap) {
  const auto c = V::broadcast(cap), inverse = V::broadcast(1.0f / cap);
  for (int64_t i = rows.row_begin * kKvTile; i < rows.row_end * kKvTile; i += kLanes) {
    V::store(tile.scores + i, V::mul(c, tanh_f32<V>(V::mul(V::load(tile.scores + i), inverse))));
  }
}

// The largest of the scores [places.begin, places.end) of one row.
template <class V>
float largest_score(const float* scores, KeyRange places) {
  const auto hidden = V::broadcast(kNoScore);
  auto highest = hidden;
  if (places.begin == 0 && places.end == kKvTile) {
    for (int64_t j = 0; j < kKvTile; j += kLanes) highest = V::max(highest, V::load(scores + j));
    return V::reduce_max(highest);
  }
  for (int64_t j = 0; j < kKvTile; j += kLanes) {
    highest = V::max(highest, V::select_range(V::load(scores + j), hidden, places.begin - j, places.end - j));
  }
  return V::reduce_max(highest);
}

// The unit of AttendTile::weights: a page has small weights beside large ones, so the largest takes all 15 bits.
static constexpr float kWeightSteps = 32767.0f;

// exp(x) for x <= 0 as 2^n * 2^r, |r| <= 1/2, 2^r by a polynomial whose largest relative error is 2^-18 (fitted over
// that range, exact at 0): less than the rounding to 15 bits, in two thirds of the instructions of exp_f32.
template <class V>
typename V::F32 exp_weight(typename V::F32 x) {
  const auto t = V::max(V::broadcast(-126.0f), V::mul(x, V::broadcast(1.44269504088896341f)));
  const auto n = V::round(t);
  const auto r = V::sub(t, n);
  auto p = V::fma(V::broadcast(0.009582851f), r, V::broadcast(0.05590643f));
  p = V::fma(p, r, V::broadcast(0.24024099f));
  p = V::fma(p, r, V::broadcast(0.6931242f));
  p = V::fma(p, r, V::broadcast(1.0f));
  return V::mul_pow2(p, n);
}

// What follows goes over all rows of a page in passes, first their maxima, then their weights: one row after the other
// would be waiting for itself.

// The keys of a page that a row sees; whole: all rows see all of them.
static inline KeyRange places_of(const AttendArgs& a, const AttendTile& tile, const PageRows& rows, bool whole, int64_t row) {
  return whole ? KeyRange{0, kKvTile} : visible_places(a, tile, row, rows.first_key);
}

// tile.page_largest: kNoScore where a row sees none of the page.
template <class V>
void find_largest(const AttendArgs& a, const AttendTile& tile, const PageRows& rows, bool whole) {
  for (int64_t row = rows.row_begin; row < rows.row_end; ++row) {
    tile.page_largest[row] = largest_score<V>(tile.scores + row * kKvTile, places_of(a, tile, rows, whole, row));
  }
}

// weigh(place, x) makes the weights of 16 keys and stores them, x: score - largest; masked, and summed into page_sum.
template <class V, class Weigh>
void weigh_scores(const AttendArgs& a, const AttendTile& tile, const PageRows& rows, bool whole, const float* largest,
                  Weigh weigh) {
  for (int64_t row = rows.row_begin; row < rows.row_end; ++row) {
    const KeyRange places = places_of(a, tile, rows, whole, row);
    auto total = V::zero();
    for (int64_t j = 0; j < kKvTile; j += kLanes) {
      const int64_t place = row * kKvTile + j;
      const auto visible = [&](typename V::F32 p) {
        return whole ? p : V::select_range(p, V::zero(), places.begin - j, places.end - j);
      };
      total = V::add(total, weigh(place, V::sub(V::load(tile.scores + place), V::broadcast(largest[row])), visible));
    }
    tile.page_sum[row] = V::reduce_add(total);
  }
}

// Takes the maxima of a page into the state.  A row that sees none of it keeps its state, bit for bit: exp(0) is 1 and a
// sum of 0 adds nothing.
template <class V>
void raise_largest(const AttendTile& tile, const PageRows& rows) {
  for (int64_t row = rows.row_begin; row < rows.row_end; row += kLanes) {
    const int64_t count = rows.row_end - row < kLanes ? rows.row_end - row : kLanes;
    const auto previous = V::load_partial(tile.state.largest + row, count);
    const auto found = V::load_partial(tile.page_largest + row, count);
    const auto largest = V::max(previous, found);  // a NaN of this page comes out
    V::store_partial(tile.state.largest + row, largest, count);
    V::store_partial(tile.correction + row, exp_f32<V>(V::sub(previous, largest)), count);
    V::store_partial(tile.take + row, exp_f32<V>(V::sub(found, largest)), count);
  }
}

// Takes the sums of a page into the state: of weights that are relative to the largest score of the page, or so far.
template <class V, bool kOfPage>
void take_sums(const AttendTile& tile, const PageRows& rows) {
  for (int64_t row = rows.row_begin; row < rows.row_end; row += kLanes) {
    const int64_t count = rows.row_end - row < kLanes ? rows.row_end - row : kLanes;
    const auto more = V::load_partial(tile.page_sum + row, count);
    auto sum = V::mul(V::load_partial(tile.state.sum + row, count), V::load_partial(tile.correction + row, count));
    sum = kOfPage ? V::fma(more, V::load_partial(tile.take + row, count), sum) : V::add(more, sum);
    V::store_partial(tile.state.sum + row, sum, count);
  }
}

// Weights in f32, in place of the scores.
template <class V>
void softmax_floats(const AttendArgs& a, const AttendTile& tile, const PageRows& rows) {
  const bool whole = see_all(a, tile, rows, kKvTile);
  find_largest<V>(a, tile, rows, whole);
  raise_largest<V>(tile, rows);
  weigh_scores<V>(a, tile, rows, whole, tile.state.largest, [&](int64_t place, typename V::F32 x, auto visible) {
    const auto p = visible(exp_f32<V>(x));
    V::store(tile.scores + place, p);
    return p;
  });
  take_sums<V, false>(tile, rows);
}

// Weights in bf16.
template <class V>
void softmax_pairs(const AttendArgs& a, const AttendTile& tile, const PageRows& rows) {
  const bool whole = see_all(a, tile, rows, kKvTile);
  auto* weights = reinterpret_cast<uint16_t*>(tile.weights);
  find_largest<V>(a, tile, rows, whole);
  raise_largest<V>(tile, rows);
  weigh_scores<V>(a, tile, rows, whole, tile.state.largest, [&](int64_t place, typename V::F32 x, auto visible) {
    const auto p = visible(exp_weight<V>(x));
    V::store_bf16(weights + place, p);
    return p;
  });
  take_sums<V, false>(tile, rows);
}

// Weights in integers, relative to the largest score of the page; their sums are taken before rounding.
template <class V>
void softmax_codes(const AttendArgs& a, const AttendTile& tile, const PageRows& rows) {
  const bool whole = see_all(a, tile, rows, kKvTile);
  find_largest<V>(a, tile, rows, whole);
  raise_largest<V>(tile, rows);
  weigh_scores<V>(a, tile, rows, whole, tile.page_largest, [&](int64_t place, typename V::F32 x, auto visible) {
    const auto p = visible(exp_weight<V>(x));
    V::store_int16(tile.weights + place, V::mul(p, V::broadcast(kWeightSteps)));
    return p;
  });
  take_sums<V, true>(tile, rows);
}

}  // namespace ropewalk
