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

// scores -> exp(score - largest), masked; updates the running maximum, sum and correction of one row.
template <class V>
void softmax_row(const AttendTile& tile, int64_t row, KeyRange places) {
  float* scores = tile.scores + row * kKvTile;
  if (places.begin == places.end) {  // nothing of this page is visible: the row keeps its state, bit for bit
    for (int64_t j = 0; j < kKvTile; j += kLanes) V::store(scores + j, V::zero());
    tile.correction[row] = 1.0f;
    return;
  }
  const float previous = tile.state.largest[row];
  const float candidate = largest_score<V>(scores, places);
  const float largest = candidate > previous ? candidate : previous;
  auto total = V::zero();
  for (int64_t j = 0; j < kKvTile; j += kLanes) {
    auto p = exp_f32<V>(V::sub(V::load(scores + j), V::broadcast(largest)));
    p = V::select_range(p, V::zero(), places.begin - j, places.end - j);
    V::store(scores + j, p);
    total = V::add(total, p);
  }
  const float correction = previous == largest ? 1.0f : V::first(exp_f32<V>(V::broadcast(previous - largest)));
  tile.state.largest[row] = largest;
  tile.correction[row] = correction;
  tile.state.sum[row] = tile.state.sum[row] * correction + V::reduce_add(total);
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

// softmax_row with weights in bf16 in place of f32, and in `weights` in place of `scores`.
template <class V>
void pair_softmax_row(const AttendTile& tile, int64_t row, KeyRange places) {
  const float* scores = tile.scores + row * kKvTile;
  auto* weights = reinterpret_cast<uint16_t*>(tile.weights) + row * kKvTile;
  if (places.begin == places.end) {
    for (int64_t j = 0; j < kKvTile; j += kLanes) V::store_bf16(weights + j, V::zero());
    tile.correction[row] = 1.0f;
    return;
  }
  const bool whole = places.begin == 0 && places.end == kKvTile;
  const float previous = tile.state.largest[row];
  const float candidate = largest_score<V>(scores, places);
  const float largest = candidate > previous ? candidate : previous;
  auto total = V::zero();
  for (int64_t j = 0; j < kKvTile; j += kLanes) {
    auto p = exp_weight<V>(V::sub(V::load(scores + j), V::broadcast(largest)));
    if (!whole) p = V::select_range(p, V::zero(), places.begin - j, places.end - j);
    V::store_bf16(weights + j, p);
    total = V::add(total, p);
  }
  const float correction = previous == largest ? 1.0f : V::first(exp_f32<V>(V::broadcast(previous - largest)));
  tile.state.largest[row] = largest;
  tile.correction[row] = correction;
  tile.state.sum[row] = tile.state.sum[row] * correction + V::reduce_add(total);
}

// weights = exp(score - largest of the page) in integers, masked, with their sum before rounding.
template <class V>
void page_softmax_row(const AttendTile& tile, int64_t row, KeyRange places) {
  const float* scores = tile.scores + row * kKvTile;
  tile.page_largest[row] = kNoScore;
  tile.page_sum[row] = 0.0f;
  if (places.begin == places.end) return;
  const bool whole = places.begin == 0 && places.end == kKvTile;
  const float largest = largest_score<V>(scores, places);
  auto total = V::zero();
  for (int64_t j = 0; j < kKvTile; j += kLanes) {
    auto p = exp_weight<V>(V::sub(V::load(scores + j), V::broadcast(largest)));
    if (!whole) p = V::select_range(p, V::zero(), places.begin - j, places.end - j);
    V::store_int16(tile.weights + row * kKvTile + j, V::mul(p, V::broadcast(kWeightSteps)));
    total = V::add(total, p);
  }
  tile.page_largest[row] = largest;
  tile.page_sum[row] = V::reduce_add(total);
}

// Takes the maxima and sums of a page into the state.  A row that sees none of it keeps its state, bit for bit:
// exp(0) is 1 and a sum of 0 adds nothing.
template <class V>
void take_page(const AttendTile& tile, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; row += kLanes) {
    const int64_t count = row_end - row < kLanes ? row_end - row : kLanes;
    const auto previous = V::load_partial(tile.state.largest + row, count);
    const auto found = V::load_partial(tile.page_largest + row, count);
    const auto largest = V::max(previous, found);  // a NaN of this page comes out
    const auto correction = exp_f32<V>(V::sub(previous, largest));
    const auto take = exp_f32<V>(V::sub(found, largest));
    const auto sum = V::mul(V::load_partial(tile.state.sum + row, count), correction);
    V::store_partial(tile.state.sum + row, V::fma(V::load_partial(tile.page_sum + row, count), take, sum), count);
    V::store_partial(tile.state.largest + row, largest, count);
    V::store_partial(tile.correction + row, correction, count);
    V::store_partial(tile.take + row, take, count);
  }
}

}  // namespace ropewalk
