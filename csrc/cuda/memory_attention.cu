// Sparse memory attention. A weight is known only when all logits of its row are: one kernel finds each row's largest
// logit and the sum of exponentials, a second computes the logits again, shrinks the weights and reads the memory with
// them. Weights stay in shared memory, and items that no row of a tile reads are left out.
#include "memory_attention.h"

#include "../common/shrink.h"
#include "tile.cuh"

namespace bkd {
namespace {

constexpr int kRows = 64, kItems = 64;  // of a tile
template <class T>
constexpr int kRead = sizeof(T) == 2 ? 256 : 128;  // channels that a block reads
constexpr int kSharers = kThreads / kRows;         // threads that share a row
constexpr float kEpsilon = 1e-8f;                  // least product of norms in a cosine

struct Logits {
  float value[kRows][kItems + 4];  // rows start four banks apart

  __device__ __forceinline__ float at(int row, int item) const { return load_shared<float>(&value[row][item]); }
};

template <class T>
struct Score {
  unsigned char a[2][Tile<T, kRows, true>::kBytes], b[2][Tile<T, kItems, true>::kBytes];
  Logits logits;
};

// The logits of kRows queries and kItems items, in shared memory; those beyond the last item are minus infinity.
template <class T, bool kTensor>
__device__ __forceinline__ void score(const MemoryAttention& p, Score<T>& shared, int first_row, int first_item) {
  using A = Tile<T, kRows, true>;
  using B = Tile<T, kItems, true>;
  const int thread = threadIdx.x;
  auto copy = [&](int step) {
    const int row = thread / 4, chunk = thread % 4, channel = step * kDepth<T> + chunk * kVector<T>;
    const bool wide_enough = channel < p.channels;
    const bool query = wide_enough && first_row + row < p.rows, item = wide_enough && first_item + row < p.items;
    const T* queries = static_cast<const T*>(p.query);
    const T* memory = static_cast<const T*>(p.memory);
    copy_async(shared.a[step % 2] + A::chunk(row, chunk),
               queries + (query ? int64_t{first_row + row} * p.channels + channel : 0), query);
    copy_async(shared.b[step % 2] + B::chunk(row, chunk),
               memory + (item ? int64_t{first_item + row} * p.channels + channel : 0), item);
    commit_copies();
  };
  Sums<kRows, kItems> sums;
  sums.clear();
  const int steps = (p.channels + kDepth<T> - 1) / kDepth<T>;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();
    if (step + 1 < steps) copy(step + 1);
    multiply_tiles<T, kTensor, A, B>(sums, shared.a[step % 2], shared.b[step % 2]);
  }
  sums.pairs([&](int row, int column, float first, float second) {
    const float dots[2] = {first, second};
    const float norm = first_row + row < p.rows ? load<float>(p.query_norms + first_row + row) : 0;
    float2 logits;
    for (int i = 0; i < 2; ++i) {
      const int item = first_item + column + i;
      const float norms = item < p.items ? norm * load<float>(p.memory_norms + item) : 0;
      const float logit = item < p.items ? dots[i] / fmaxf(norms, kEpsilon) / p.temperature : -INFINITY;
      (i ? logits.y : logits.x) = logit;
    }
    store_shared(&shared.logits.value[row][column], logits);
  });
  __syncthreads();
}

// Largest logit and sum of exponentials, of more and more logits.
struct Normalizer {
  float largest = -INFINITY, sum = 0;

  __device__ __forceinline__ void add(float largest_other, float sum_other) {
    const float both = fmaxf(largest, largest_other);
    // Not a number where a logit is not; a part without logits adds nothing.
    sum = (sum == 0 ? 0 : sum * expf(largest - both)) + (sum_other == 0 ? 0 : sum_other * expf(largest_other - both));
    largest = both;
  }
  template <int kLanes>
  __device__ __forceinline__ void share() {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAll, largest, step);
      add(other, __shfl_xor_sync(kAll, sum, step));
    }
  }
};

template <class T, bool kTensor>
__global__ void __launch_bounds__(kThreads, 2) memory_attention_normalizer_kernel(const MemoryAttention p) {
  using Shared = Score<T>;
  BKD_SHARED(Shared, shared);
  const int first_row = blockIdx.x * kRows, row = threadIdx.x / kSharers, own = threadIdx.x % kSharers;
  const int tiles = (p.items + kItems - 1) / kItems;
  const int begin = tiles * blockIdx.y / p.splits, end = tiles * (blockIdx.y + 1) / p.splits;
  Normalizer normalizer;
  for (int tile = begin; tile < end; ++tile) {
    score<T, kTensor>(p, shared, first_row, tile * kItems);
    float largest = -INFINITY, sum = 0;
    for (int item = own; item < kItems; item += kSharers) largest = fmaxf(largest, shared.logits.at(row, item));
    for (int item = own; item < kItems; item += kSharers) {
      const float logit = shared.logits.at(row, item);
      if (logit != -INFINITY) sum += expf(logit - largest);
    }
    normalizer.add(largest, sum);
    __syncthreads();  // before the logits are written again
  }
  normalizer.template share<kSharers>();
  if (own == 0 && first_row + row < p.rows) {
    store(p.parts + 2 * (int64_t{blockIdx.y} * p.rows + first_row + row),
          make_float2(normalizer.largest, normalizer.sum));
  }
}

template <class T>
struct Read {
  static constexpr int kSteps = kItems / kDepth<T>;  // that a tile of items is multiplied in
  union {                                            // logits are no longer needed when the memory is read
    Score<T> score;
    unsigned char memory[2][Tile<T, kRead<T>, false>::kBytes];
  };
  unsigned char weights[kSteps][Tile<T, kRows, true>::kBytes];
  int alive[kSteps];  // whether any row reads any of these items
  float scale[kRows];
};

template <class T, bool kTensor>
__global__ void __launch_bounds__(kThreads, BKD_ARCH >= 800 ? 2 : 1) memory_attention_kernel(const MemoryAttention p) {
  using W = Tile<T, kRows, true>;
  using M = Tile<T, kRead<T>, false>;
  using Shared = Read<T>;
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const T* memory = static_cast<const T*>(p.memory);
  const int first_row = blockIdx.x * kRows, first_channel = blockIdx.y * kRead<T>, thread = threadIdx.x;
  const int row = thread / kSharers, own = thread % kSharers;

  Normalizer normalizer;
  if (first_row + row < p.rows) {
    for (int split = 0; split < p.splits; ++split) {
      const float2 part = load<float2>(p.parts + 2 * (int64_t{split} * p.rows + first_row + row));
      normalizer.add(part.x, part.y);
    }
  }
  float total = 0;
  Sums<kRows, kRead<T>> sums;
  sums.clear();
  for (int first_item = 0; first_item < p.items; first_item += kItems) {
    if (thread < Shared::kSteps) shared.alive[thread] = 0;
    score<T, kTensor>(p, shared.score, first_row, first_item);
#pragma unroll 1
    for (int step = 0; step < Shared::kSteps; ++step) {
      bool any = false;
      for (int i = own; i < kDepth<T>; i += kSharers) {
        const float logit = shared.score.logits.at(row, step * kDepth<T> + i);
        const bool there = logit != -INFINITY && first_row + row < p.rows;
        const float weight = there ? shrink(expf(logit - normalizer.largest) / normalizer.sum, p.threshold) : 0;
        total += weight;
        any |= weight != 0;
        const float kept = kTensor && sizeof(T) == 4 ? rounded_to_tf32(weight) : weight;
        store_shared(
            shared.weights[step] + W::chunk(row, i / kVector<T>) + i % kVector<T> * static_cast<int>(sizeof(T)),
            narrow<T>(kept));
      }
      if (any) shared.alive[step] = 1;
    }
    __syncthreads();
    auto copy = [&](int step) {
      constexpr int kWide = kRead<T> / kVector<T>;
#pragma unroll
      for (int i = 0; i < kDepth<T> * kWide / kThreads; ++i) {
        const int depth = (i * kThreads + thread) / kWide, chunk = thread % kWide;
        const int item = first_item + step * kDepth<T> + depth, channel = first_channel + chunk * kVector<T>;
        const bool valid = item < p.items && channel < p.channels;
        copy_async(shared.memory[step % 2] + M::chunk(depth, chunk),
                   memory + (valid ? int64_t{item} * p.channels + channel : 0), valid);
      }
    };
    if (shared.alive[0]) copy(0);
    commit_copies();
#pragma unroll
    for (int step = 0; step < Shared::kSteps; ++step) {
      wait_for_copies<0>();
      __syncthreads();
      if (step + 1 < Shared::kSteps && shared.alive[step + 1]) copy(step + 1);
      commit_copies();
      if (shared.alive[step]) multiply_tiles<T, kTensor, W, M>(sums, shared.weights[step], shared.memory[step % 2]);
    }
    __syncthreads();  // before logits are written where the memory is
  }
  total = sum_lanes<kSharers>(total);
  if (own == 0) shared.scale[row] = p.renormalize && total > 0 ? 1 / total : 1;
  __syncthreads();
  T* output = static_cast<T*>(p.output);
  sums.pairs([&](int row, int column, float first, float second) {
    const int channel = first_channel + column;
    if (first_row + row >= p.rows || channel >= p.channels) return;
    const float scale = load_shared<float>(&shared.scale[row]);
    store(output + int64_t{first_row + row} * p.channels + channel,
          Both<T>{narrow<T>(first * scale), narrow<T>(second * scale)});
  });
}

template <class T, bool kTensor>
void start(const MemoryAttention& p, const Device& device) {
  const int64_t tiles = blocks_for(p.rows, kRows);
  launch("memory_attention_normalizer", &memory_attention_normalizer_kernel<T, kTensor>, tiles, p.splits, 1, kThreads,
         0, device, p);
  launch("memory_attention", &memory_attention_kernel<T, kTensor>, tiles, blocks_for(p.channels, kRead<T>), 1, kThreads,
         sizeof(Read<T>), device, p);
}

// A warp has a row; the row is read again for each of the sums that depend on one another.
__global__ void __launch_bounds__(kThreads) memory_attention_gradient_kernel(const MemoryAttentionGradient p) {
  constexpr float kDelta = 1e-12f;  // of Eq. 9
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;  // a whole warp
  float* dots = p.dots + row * p.items;
  float* by_read = p.by_read + row * p.items;
  const float norm = load<float>(p.query_norms + row);
  auto norms = [&](int item) { return norm * load<float>(p.memory_norms + item); };
  auto cosine = [&](int item) { return load<float>(dots + item) / fmaxf(norms(item), kEpsilon); };

  Normalizer normalizer;
  for (int item = lane; item < p.items; item += kWarpSize) normalizer.add(cosine(item) / p.temperature, 1);
  normalizer.share<kWarpSize>();
  auto weight = [&](int item) { return expf(cosine(item) / p.temperature - normalizer.largest) / normalizer.sum; };

  float total = 0, along = 0;
  for (int item = lane; item < p.items; item += kWarpSize) {
    const float sparse = shrink(weight(item), p.threshold);
    total += sparse;
    along += sparse * load<float>(by_read + item);
  }
  total = sum_lanes(total), along = sum_lanes(along);
  const float scale = p.renormalize && total > 0 ? 1 / total : 1;
  along = p.renormalize ? along * scale : 0;
  // The gradient by a weight before Eq. 9.
  auto by_weight = [&](int item, float weight) {
    const float above = weight - p.threshold;
    if (!(above > 0)) return above == above ? 0.0f : above;
    const float slope = above / (above + kDelta) + weight * kDelta / ((above + kDelta) * (above + kDelta));
    return (load<float>(by_read + item) - along) * scale * slope;
  };
  float inner = 0;
  for (int item = lane; item < p.items; item += kWarpSize) {
    const float own = weight(item);
    inner += own * by_weight(item, own);
  }
  inner = sum_lanes(inner);
  for (int item = lane; item < p.items; item += kWarpSize) {
    const float own = weight(item), product = norms(item), cos = cosine(item);
    const float by_cosine = own * (by_weight(item, own) - inner) / p.temperature;
    store(p.pull + row * p.items + item, product > kEpsilon ? by_cosine * cos : 0);
    store(by_read + item, shrink(own, p.threshold) * scale);
    store(dots + item, by_cosine / fmaxf(product, kEpsilon));
  }
}

}  // namespace

void memory_attention(const MemoryAttention& p, Type type, bool tf32, const Device& device) {
  if (type == Type::kHalf) return start<Half, true>(p, device);
  if (type == Type::kBFloat) return start<BFloat, true>(p, device);
  if (tf32) return start<float, true>(p, device);
  start<float, false>(p, device);
}

void memory_attention_gradient(const MemoryAttentionGradient& p, const Device& device) {
  launch("memory_attention_gradient", &memory_attention_gradient_kernel, blocks_for(p.rows, kThreads / kWarpSize), 1, 1,
         kThreads, 0, device, p);
}

}  // namespace bkd
