// Products of a few rows and the attention of decoding on a CPU, as calls of XLA's FFI: `native.py`
// compiles this file and says when it is used.
//
// A decoding step multiplies a few rows by every kernel of the model, which is to be read once, at
// the rate of the memory. XLA's libraries lay a kernel out for their own loops at every product;
// here that is done once, before the loop (`Pack`):
//
//     kernel [K, N]   ->   tiles [ceil(N / NR), K, NR]        NR columns lie side by side, and a
//                                                             tile is read from front to back
//
// A number of a product is a sum over k in rising order; a score, whose words are read as they lie, is a
// sum in every lane of each W-th k, then over the lanes, then over what is left of k. So it is whatever
// the rows, the tile and the threads are: a row has the same result alone and in a batch, bit by bit.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// W floats in a vector; a product holds MR rows x NV vectors of results in registers, the scores
// of words the sums of PANEL rows and some words.
#if defined(__AVX512F__)
constexpr int W = 16, NV = 3, MR = 8, PANEL = 8, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int W = 8, NV = 2, MR = 6, PANEL = 4, REGISTERS = 16;
#else
constexpr int W = 4, NV = 3, MR = 6, PANEL = 4, REGISTERS = 16;
#endif
constexpr int64_t NR = W * NV;
constexpr int64_t KC = 384;  // of the contraction at a time, where several panels read a tile: for L2

constexpr int64_t LINE = 16;  // floats that memory gives at once
// How far ahead of its use a float is fetched into L2.
constexpr int64_t TILE_AHEAD = 32 * NR, SCORES_AHEAD = 7168;
constexpr int64_t SCORES_AT_ONCE = 1 << 17;  // floats of words that a thread takes: 512 KB

typedef float Vec __attribute__((vector_size(W * sizeof(float))));
typedef float Loose __attribute__((vector_size(W * sizeof(float)), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(W * sizeof(int32_t))));

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Loose*>(p) = x; }

// Runs f(0), ..., f(parts - 1) on this thread and those of XLA's pool that come in time. It waits
// for parts that have begun, never for a thread to begin.
template <class F>
void in_parallel(ffi::ThreadPool& pool, int64_t parts, F f) {
  int64_t threads = std::min<int64_t>(parts, pool.num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < parts; i++) f(i);
    return;
  }
  struct Count {
    std::atomic<int64_t> next{0}, done{0};
  };
  // Shared: a thread may come when all is done, and `f` be gone.
  auto count = std::make_shared<Count>();
  auto work = [count, parts, f] {
    for (int64_t i; (i = count->next.fetch_add(1)) < parts;) {
      f(i);
      count->done.fetch_add(1);
    }
  };
  for (int64_t t = 1; t < threads; t++) {
    auto copy = work;
    pool.Schedule(std::move(copy));
  }
  work();
  // Parts are short. But on a machine that is shared, who has one may be waiting for this core.
  for (int turns = 0; count->done.load() < parts; turns++)
    if (turns > 1000) std::this_thread::yield();
}

// The rows of x and of y that are multiplied, one after another.
struct Row {
  const float* x;
  float* y;
};

// y[0 : NR] (+)= x[k : k + width] tile for M rows; the tile is the part of one from k on.
template <int M>
void product(const Row* rows, int64_t k, int64_t width, const float* tile, int64_t column) {
  Vec sum[M][NV];
  const float* x[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) {
    x[m] = rows[m].x + k;
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) sum[m][j] = k > 0 ? load(rows[m].y + column + j * W) : Vec{};
  }
  for (int64_t i = 0; i < width; i++, tile += NR) {
    Vec w[NV];
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) {
      w[j] = load(tile + j * W);
      __builtin_prefetch(tile + TILE_AHEAD + j * W, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
#pragma GCC unroll 3
      for (int j = 0; j < NV; j++) sum[m][j] += x[m][i] * w[j];
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 3
    for (int j = 0; j < NV; j++) store(rows[m].y + column + j * W, sum[m][j]);
}

// The same for all `rows`, in panels of MR at most and of like size.
void products(const std::vector<Row>& rows, int64_t k, int64_t width, const float* tile,
              int64_t column) {
  const Row* first = rows.data();
  int64_t left = rows.size();
  for (int64_t panels = (left + MR - 1) / MR; panels > 0; panels--) {
    int64_t m = (left + panels - 1) / panels;
    switch (m) {
      case 1: product<1>(first, k, width, tile, column); break;
      case 2: product<2>(first, k, width, tile, column); break;
      case 3: product<3>(first, k, width, tile, column); break;
      case 4: product<4>(first, k, width, tile, column); break;
      case 5: product<5>(first, k, width, tile, column); break;
      case 6: product<6>(first, k, width, tile, column); break;
      case 7: product<7>(first, k, width, tile, column); break;
      case 8: product<8>(first, k, width, tile, column); break;
    }
    first += m, left -= m;
  }
}

// y[:, t NR : (t + 1) NR] for `rows` of y [., N]; `multiply` is given rows and the column at which
// it writes. The last tile may reach beyond y, and is multiplied apart.
template <class F>
void columns_of(const std::vector<Row>& rows, int64_t N, int64_t t, F multiply) {
  int64_t columns = N - t * NR;
  if (columns >= NR) return multiply(rows, t * NR);
  std::vector<float> whole(rows.size() * NR);
  std::vector<Row> apart(rows);
  for (size_t m = 0; m < rows.size(); m++) apart[m].y = whole.data() + m * NR;
  multiply(apart, 0);
  for (size_t m = 0; m < rows.size(); m++)
    std::memcpy(rows[m].y + t * NR, apart[m].y, columns * sizeof(float));
}

using Floats = ffi::AnyBuffer;

bool floats(const ffi::AnyBuffer& x, size_t rank) {
  return x.element_type() == ffi::F32 && x.dimensions().size() == rank;
}

ffi::Error wrong(const char* what) { return ffi::Error::InvalidArgument(what); }

// Memory that is new for every program costs a fault for each page of 4 KB: as long as the copy. The
// tiles of a program lie side by side, so that a page that reaches beyond one holds parts of others.
void in_large_pages([[maybe_unused]] void* start, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 1 << 21;
  uintptr_t from = reinterpret_cast<uintptr_t>(start) & ~(PAGE - 1);
  uintptr_t to = (reinterpret_cast<uintptr_t>(start) + bytes + PAGE - 1) & ~(PAGE - 1);
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // advice, which may fail
#endif
}

// kernels [L, K, N], layer -> tiles [ceil(N / NR), K, NR], 0 beyond N.
ffi::Error Pack(ffi::ThreadPool pool, Floats kernels, ffi::Result<Floats> tiles, int64_t layer) {
  if (!floats(kernels, 3) || !floats(*tiles, 3)) return wrong("Pack takes float32 [L, K, N]");
  int64_t K = kernels.dimensions()[1], N = kernels.dimensions()[2], count = (N + NR - 1) / NR;
  if (layer < 0 || layer >= static_cast<int64_t>(kernels.dimensions()[0]) ||
      tiles->dimensions()[0] != count || tiles->dimensions()[1] != K || tiles->dimensions()[2] != NR)
    return wrong("Pack: shapes do not match");
  const float* from = kernels.typed_data<float>() + layer * K * N;
  float* to = tiles->typed_data<float>();
  in_large_pages(to, count * K * NR * sizeof(float));
  constexpr int64_t ROWS = 64;  // a part reads some whole rows
  in_parallel(pool, (K + ROWS - 1) / ROWS, [=](int64_t part) {
    for (int64_t i = part * ROWS; i < std::min(K, (part + 1) * ROWS); i++)
      for (int64_t t = 0; t < count; t++) {
        int64_t columns = std::min(NR, N - t * NR);
        float* row = to + (t * K + i) * NR;
        std::memcpy(row, from + i * N + t * NR, columns * sizeof(float));
        std::memset(row + columns, 0, (NR - columns) * sizeof(float));
      }
  });
  return ffi::Error::Success();
}

// x [M, K], tiles [ceil(N / NR), K, NR], real [M] -> x W [M, N], 0 in rows that are not real.
ffi::Error Dot(ffi::ThreadPool pool, Floats x, Floats tiles, ffi::Buffer<ffi::PRED> real,
               ffi::Result<Floats> y) {
  if (!floats(x, 2) || !floats(tiles, 3) || !floats(*y, 2)) return wrong("Dot takes float32");
  int64_t M = x.dimensions()[0], K = x.dimensions()[1], N = y->dimensions()[1];
  int64_t count = tiles.dimensions()[0];
  if (y->dimensions()[0] != M || tiles.dimensions()[1] != K || tiles.dimensions()[2] != NR ||
      count != (N + NR - 1) / NR || static_cast<int64_t>(real.element_count()) != M || K < 1)
    return wrong("Dot: shapes do not match");
  const float* ws = tiles.typed_data<float>();
  std::vector<Row> rows;
  for (int64_t m = 0; m < M; m++) {
    Row row{x.typed_data<float>() + m * K, y->typed_data<float>() + m * N};
    if (real.typed_data()[m])
      rows.push_back(row);
    else
      std::fill(row.y, row.y + N, 0.0f);
  }
  int64_t step = rows.size() > MR ? KC : K;
  in_parallel(pool, count, [=, &rows](int64_t t) {
    columns_of(rows, N, t, [=](const std::vector<Row>& these, int64_t column) {
      for (int64_t k = 0; k < K; k += step)
        products(these, k, std::min(step, K - k), ws + (t * K + k) * NR, column);
    });
  });
  return ffi::Error::Success();
}

// The lanes of `a` and of `b` where bit D of their number is 0 (`upper`: is 1), side by side.
template <int D, bool upper, size_t... L>
inline Vec lanes(Vec a, Vec b, std::index_sequence<L...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (L & D ? W + L - (upper ? 0 : D) : L + (upper ? D : 0))...);
#else
  return __builtin_shuffle(a, b, Ints{(L & D ? W + L - (upper ? 0 : D) : L + (upper ? D : 0))...});
#endif
}

// The sums of `PANEL` vectors' lanes: that of x[m] in lane m W / PANEL.
template <int D, int count>
inline Vec sums(const Vec* x) {
  using all = std::make_index_sequence<W>;
  if constexpr (D == 0) {
    return *x;
  } else if constexpr (count == 1) {
    Vec half = *x + lanes<D, true>(*x, *x, all{});
    return sums<D / 2, 1>(&half);
  } else {
    Vec half[count / 2];
#pragma GCC unroll 4
    for (int i = 0; i < count / 2; i++) {
      const Vec &a = x[i], &b = x[i + count / 2];
      half[i] = lanes<D, false>(a, b, all{}) + lanes<D, true>(a, b, all{});
    }
    return sums<D / 2, count / 2>(half);
  }
}

// y[:, v : v + C] of M rows, for C words that lie one after another; `x` [K / W, M, W] holds the
// rows' numbers in the order in which they are read, but for those beyond the last whole vector.
template <int M, int C>
void scores_of(const float* x, const Row* rows, const float* words, int64_t K, int64_t v) {
  Vec sum[C][PANEL] = {};
  words += v * K;
  int64_t i = 0;
  for (; i + W <= K; i += W, x += M * W) {
    Vec word[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      word[c] = load(words + c * K + i);
      if (i % LINE == 0) __builtin_prefetch(words + c * K + i + SCORES_AHEAD, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      Vec one = load(x + m * W);
#if defined(__x86_64__)
      asm("" : "+v"(one));  // or it is read again for each of the words
#endif
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) sum[c][m] += one * word[c];
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; c++) {
    float whole[W];
    store(whole, sums<W / 2, PANEL>(sum[c]));
    for (int m = 0; m < M; m++) {
      float score = whole[m * (W / PANEL)];
      for (int64_t k = i; k < K; k++) score += rows[m].x[k] * words[c * K + k];
      rows[m].y[v + c] = score;
    }
  }
}

template <int M>
void scores_of(const float* x, const Row* rows, const float* words, int64_t K, int64_t v,
               int64_t end) {
  constexpr int C = std::min(8, (REGISTERS - 1) / (M + 1));  // sums, words, and a part of a row
  for (; v + C <= end; v += C) scores_of<M, C>(x, rows, words, K, v);
  for (; v < end; v++) scores_of<M, 1>(x, rows, words, K, v);
}

// x [M, K], words [V, K] -> x W^T [M, V]. Words are read as they lie, and a score is a sum over
// lanes first: laid out in tiles they would be a second head in memory, or be laid out every time.
ffi::Error Scores(ffi::ThreadPool pool, Floats x, Floats words, ffi::Result<Floats> y) {
  if (!floats(x, 2) || !floats(words, 2) || !floats(*y, 2)) return wrong("Scores takes float32");
  int64_t M = x.dimensions()[0], K = x.dimensions()[1], V = words.dimensions()[0];
  if (words.dimensions()[1] != K || y->dimensions()[0] != M || y->dimensions()[1] != V || K < 1)
    return wrong("Scores: shapes do not match");
  const float* ws = words.typed_data<float>();
  struct Panel {
    int64_t first, rows;
  };
  std::vector<Row> rows;
  for (int64_t m = 0; m < M; m++)
    rows.push_back({x.typed_data<float>() + m * K, y->typed_data<float>() + m * V});
  std::vector<Panel> panels;  // of like size
  for (int64_t first = 0, left = (M + PANEL - 1) / PANEL; left > 0; left--) {
    panels.push_back({first, (M - first + left - 1) / left});
    first += panels.back().rows;
  }
  struct alignas(W * sizeof(float)) Part {
    float x[W];
  };
  const int64_t whole = K / W;
  std::vector<Part> ordered(M * whole);
  for (const Panel& panel : panels)
    for (int64_t i = 0; i < whole; i++)
      for (int64_t m = 0; m < panel.rows; m++)
        std::memcpy(&ordered[panel.first * whole + i * panel.rows + m],
                    rows[panel.first + m].x + i * W, sizeof(Part));
  // Few enough words to stay in L2 for all panels, where they are not too wide.
  const int64_t run = std::max<int64_t>(REGISTERS, SCORES_AT_ONCE / K);
  in_parallel(pool, (V + run - 1) / run, [=, &rows, &panels, &ordered](int64_t part) {
    int64_t v = part * run, end = std::min(V, v + run);
    for (const Panel& panel : panels) {
      const float* from = reinterpret_cast<const float*>(ordered.data() + panel.first * whole);
      const Row* these = rows.data() + panel.first;
      switch (panel.rows) {
        case 1: scores_of<1>(from, these, ws, K, v, end); break;
        case 2: scores_of<2>(from, these, ws, K, v, end); break;
        case 3: scores_of<3>(from, these, ws, K, v, end); break;
        case 4: scores_of<4>(from, these, ws, K, v, end); break;
#if defined(__AVX512F__)
        case 5: scores_of<5>(from, these, ws, K, v, end); break;
        case 6: scores_of<6>(from, these, ws, K, v, end); break;
        case 7: scores_of<7>(from, these, ws, K, v, end); break;
        case 8: scores_of<8>(from, these, ws, K, v, end); break;
#endif
      }
    }
  });
  return ffi::Error::Success();
}

template <int N>
inline float sum_of(const float* p) {
  if constexpr (N == 1) {
    return *p;
  } else {
    typedef float Half __attribute__((vector_size(N / 2 * sizeof(float)), aligned(4), may_alias));
    Half half = *reinterpret_cast<const Half*>(p) + *reinterpret_cast<const Half*>(p + N / 2);
    return sum_of<N / 2>(reinterpret_cast<const float*>(&half));
  }
}
inline float sum_of(Vec x) { return sum_of<W>(reinterpret_cast<const float*>(&x)); }

// e^x for x <= 0, within 2 units in the last place (S. Moshier, Cephes, expf).
inline Vec exponential(Vec x) {
  Vec low = Vec{} - 87.0f;
  x = x < low ? low : x;
  constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = (x * 1.44269504f + round) - round;
  Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return p * (Vec)power;  // its bits are those of 2^n
}

constexpr float UNSEEN = -1e30f;

// One head of keys and values [S, h] for queries [R, h], of which query r sees what mask[r % T]
// says of the slots from `first` to `end`; `weights` has room for [R, end - first + W].
void attend_one(const float* q, const float* keys, const float* values, const bool* mask, float* y,
                int64_t R, int64_t T, int64_t S, int64_t h, int64_t first, int64_t end, float scale,
                float* weights) {
  int64_t width = end - first, room = width + W;
  for (int64_t r = 0; r < R; r++) {
    const float* query = q + r * h;
    float* w = weights + r * room;
    const bool* sees = mask + r % T * S + first;
    float most = -std::numeric_limits<float>::infinity();
    bool any = false;
    for (int64_t s = 0; s < width; s++) {
      w[s] = UNSEEN;
      if (!sees[s]) continue;
      const float* key = keys + (first + s) * h;
      if (r == 0)  // the values are next
        for (int64_t i = 0; i < h; i += LINE) __builtin_prefetch(values + (first + s) * h + i);
      Vec sum{};
      int64_t i = 0;
      for (; i + W <= h; i += W) sum += load(query + i) * load(key + i);
      float score = sum_of(sum);
      for (; i < h; i++) score += query[i] * key[i];
      w[s] = score * scale;
      most = std::max(most, w[s]);
      any = true;
    }
    float* out = y + r * h;
    if (!any) {  // a query of padding
      std::fill(out, out + h, 0.0f);
      continue;
    }
    std::fill(w + width, w + room, UNSEEN);
    Vec total{};
    for (int64_t s = 0; s < width; s += W) {
      Vec e = exponential(load(w + s) - most);
      // Not e^-87 where a slot is not seen: there it is 0.
      e = load(w + s) == UNSEEN ? Vec{} : e;
      total += e;
      store(w + s, e);
    }
    float inverse = 1.0f / sum_of(total);
    int64_t i = 0;
    for (; i + 4 * W <= h; i += 4 * W) {
      Vec a{}, b{}, c{}, d{};
      const float* value = values + first * h + i;
      for (int64_t s = 0; s < width; s++, value += h) {
        a += w[s] * load(value);
        b += w[s] * load(value + W);
        c += w[s] * load(value + 2 * W);
        d += w[s] * load(value + 3 * W);
      }
      store(out + i, a * inverse);
      store(out + i + W, b * inverse);
      store(out + i + 2 * W, c * inverse);
      store(out + i + 3 * W, d * inverse);
    }
    for (; i + W <= h; i += W) {
      Vec a{};
      for (int64_t s = 0; s < width; s++) a += w[s] * load(values + (first + s) * h + i);
      store(out + i, a * inverse);
    }
    for (; i < h; i++) {
      float a = 0;
      for (int64_t s = 0; s < width; s++) a += w[s] * values[(first + s) * h + i];
      out[i] = a * inverse;
    }
  }
}

// q [B, K, G, T, h], keys and values [B, K, S, h], mask [B, T, S], filled [] -> like q.
ffi::Error Attend(ffi::ThreadPool pool, Floats q, Floats keys, Floats values,
                  ffi::Buffer<ffi::PRED> mask, ffi::BufferR0<ffi::S32> filled,
                  ffi::Result<Floats> y, float scale) {
  if (!floats(q, 5) || !floats(keys, 4) || !floats(values, 4) || !floats(*y, 5) ||
      mask.dimensions().size() != 3)
    return wrong("Attend takes float32");
  auto shape = q.dimensions();
  int64_t B = shape[0], K = shape[1], G = shape[2], T = shape[3], h = shape[4];
  int64_t S = keys.dimensions()[2];
  for (const Floats& cache : {keys, values})
    if (cache.dimensions()[0] != B || cache.dimensions()[1] != K || cache.dimensions()[2] != S ||
        cache.dimensions()[3] != h)
      return wrong("Attend: shapes do not match");
  if (mask.dimensions()[0] != B || mask.dimensions()[1] != T || mask.dimensions()[2] != S ||
      y->element_count() != q.element_count())
    return wrong("Attend: shapes do not match");
  const float *qs = q.typed_data<float>(), *ks = keys.typed_data<float>();
  const float* vs = values.typed_data<float>();
  const bool* sees = mask.typed_data();
  float* ys = y->typed_data<float>();
  int64_t end = std::max<int64_t>(0, std::min<int64_t>(S, filled.typed_data()[0]));
  in_parallel(pool, B * K, [=](int64_t pair) {
    int64_t row = pair / K, first = end;
    for (int64_t t = 0; t < T; t++) {
      const bool* begin = sees + (row * T + t) * S;
      first = std::min<int64_t>(first, std::find(begin, begin + end, true) - begin);
    }
    std::vector<float> weights(G * T * (end - first + W));
    attend_one(qs + pair * G * T * h, ks + pair * S * h, vs + pair * S * h, sees + row * T * S,
               ys + pair * G * T * h, G * T, T, S, h, first, end, scale, weights.data());
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" int64_t minillm_columns() { return NR; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    minillm_pack, Pack,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Ret<Floats>().Attr<int64_t>("layer"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    minillm_dot, Dot,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Arg<ffi::Buffer<ffi::PRED>>()
        .Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    minillm_scores, Scores,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(minillm_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Ret<Floats>()
                                  .Attr<float>("scale"));
