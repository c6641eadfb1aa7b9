// Sparse memory attention, given the dot products of queries and items. One warp per row computes the weights and lists
// the nonzero ones; a second kernel gathers the listed items. Rows whose list overflows go through a tiled GEMM.
#include "memory_attention.h"

#include "../common/shrink.h"
#include "pipeline.cuh"

namespace bkd {
namespace {

constexpr int kWarps = kThreads / kWarpSize;
constexpr float kEpsilon = 1e-8f;  // min product of norms in a cosine

// A nonzero weight.
struct Kept {
  int item;
  float weight;
};

// values[item] = visit(item, values[item]) for this lane's items of a row. Loads are batched: stores in between would
// serialize them.
template <class Visit>
__device__ __forceinline__ void for_each(float* values, int items, Visit visit) {
  constexpr int kUnroll = 8;
  for (int first = threadIdx.x % kWarpSize; first < items; first += kUnroll * kWarpSize) {
    float value[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int item = first + i * kWarpSize;
      value[i] = item < items ? load<float>(values + item) : 0;
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int item = first + i * kWarpSize;
      if (item < items) store(values + item, visit(item, value[i]));
    }
  }
}

__global__ void __launch_bounds__(kThreads) memory_attention_weights_kernel(const MemoryAttention p) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;               // uniform across the warp
  float* values = p.dots + row * p.items;  // each lane rereads only its own writes
  Kept* list = static_cast<Kept*>(p.kept) + row * p.max_kept;
  const float norm = load<float>(p.query_norms + row);

  float largest = -INFINITY, sum = 0, total = 0;
  for_each(values, p.items, [&](int item, float dot) {
    const float logit = dot / fmaxf(norm * load<float>(p.memory_norms + item), kEpsilon) / p.temperature;
    largest = fmaxf(largest, logit);
    return logit;
  });
  largest = max_lanes(largest);
  for_each(values, p.items, [&](int, float logit) {
    const float exponential = expf(logit - largest);
    sum += exponential;
    return exponential;
  });
  sum = sum_lanes(sum);
  for_each(values, p.items, [&](int, float exponential) {
    const float weight = shrink(exponential / sum, p.threshold);
    total += weight;
    return weight;
  });
  total = sum_lanes(total);
  const float scale = p.renormalize && total > 0 ? 1 / total : 1;

  int count = 0;
  for (int first = 0; first < p.items; first += kWarpSize) {
    const int item = first + lane;
    const float weight = item < p.items ? load<float>(values + item) : 0;
    const uint32_t kept = __ballot_sync(kAll, weight != 0);  // NaN is kept
    const int slot = count + __popc(kept & ((1u << lane) - 1));
    if (weight != 0 && slot < p.max_kept) store(list + slot, Kept{item, weight * scale});
    count += __popc(kept);
  }
  if (count > p.max_kept) for_each(values, p.items, [&](int, float weight) { return weight * scale; });
  if (lane == 0) store(p.counts + row, count > p.max_kept ? -1 : count);
}

// One warp per row, 16 bytes of channels per lane.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) memory_attention_listed_kernel(const MemoryAttention p) {
  const int lane = threadIdx.x % kWarpSize, channel = (blockIdx.y * kWarpSize + lane) * kVector<T>;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;  // uniform across the warp
  const int count = load<int>(p.counts + row);
  if (count < 0) return;
  const Kept* list = static_cast<const Kept*>(p.kept) + row * p.max_kept;
  const T* memory = static_cast<const T*>(p.memory) + channel;
  const bool valid = channel < p.channels;
  constexpr int kPairs = kVector<T> / 2;
  float2 sums[kPairs] = {};
  for (int first = 0; first < count; first += kWarpSize) {
    Kept own{0, 0};
    if (first + lane < count) own = load<Kept>(list + first + lane);
    const int last = min(kWarpSize, count - first);
#pragma unroll 4  // loads in flight
    for (int i = 0; i < last; ++i) {
      const int item = __shfl_sync(kAll, own.item, i);
      const float weight = __shfl_sync(kAll, own.weight, i);
      if (!valid) continue;
      const auto read = load<Pack<T>>(memory + int64_t{item} * p.channels);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float2 pair = read.pair(j);
        sums[j] = make_float2(sums[j].x + weight * pair.x, sums[j].y + weight * pair.y);
      }
    }
  }
  if (!valid) return;
  Pack<T> result;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) result.set_pair(j, sums[j]);
  store(static_cast<T*>(p.output) + row * p.channels + channel, result);
}

constexpr int kRows = 64;  // per tile
template <class T>
constexpr int kReadChannels = sizeof(T) == 2 ? 256 : 128;  // channels per block

template <class T>
struct Dense {
  unsigned char weights[2][Tile<T, kRows, true>::kBytes], memory[2][Tile<T, kReadChannels<T>, false>::kBytes];
};

// Rows whose list overflowed; the other rows get zero weights and keep the output that they have.
template <class T, bool kTensor>
__global__ void __launch_bounds__(kThreads, BKD_ARCH >= 800 ? 2 : 1)
    memory_attention_dense_kernel(const MemoryAttention p) {
  using W = Tile<T, kRows, true>;
  using M = Tile<T, kReadChannels<T>, false>;
  using Shared = Dense<T>;
  BKD_SHARED(Shared, shared);
  const T* memory = static_cast<const T*>(p.memory);
  const int first_row = blockIdx.x * kRows, first_channel = blockIdx.y * kReadChannels<T>, thread = threadIdx.x;
  auto dense = [&](int row) { return row < p.rows && load<int>(p.counts + row) < 0; };
  if (!__syncthreads_or(thread < kRows && dense(first_row + thread))) return;

  constexpr int kThreadsPerRow = kThreads / kRows;
  const int row = thread / kThreadsPerRow, own = thread % kThreadsPerRow;
  const bool is_dense = dense(first_row + row);
  int step = 0;
  const auto copy = [&](int stage, bool) {
    unsigned char* weights = shared.weights[stage];
#pragma unroll 1  // to save registers
    for (int i = own; i < kDepth<T>; i += kThreadsPerRow) {
      const int item = step * kDepth<T> + i;
      const float weight =
          is_dense && item < p.items ? load<float>(p.dots + int64_t{first_row + row} * p.items + item) : 0;
      const float kept = kTensor && sizeof(T) == 4 ? rounded_to_tf32(weight) : weight;
      store_shared(weights + W::chunk(row, i / kVector<T>) + i % kVector<T> * static_cast<int>(sizeof(T)),
                   narrow<T>(kept));
    }
    constexpr int kRowChunks = kReadChannels<T> / kVector<T>;
#pragma unroll
    for (int i = 0; i < kDepth<T> * kRowChunks / kThreads; ++i) {
      const int depth = (i * kThreads + thread) / kRowChunks, chunk = thread % kRowChunks;
      const int item = step * kDepth<T> + depth, channel = first_channel + chunk * kVector<T>;
      const bool valid = item < p.items && channel < p.channels;
      copy_async(shared.memory[stage] + M::chunk(depth, chunk),
                 memory + (valid ? int64_t{item} * p.channels + channel : 0), valid);
    }
    ++step;
  };
  AccumulatorFragment<kRows, kReadChannels<T>> sums;
  sums.clear();
  const LaneOffsets<W, M, decltype(sums)> lane;
  NoSamples samples;
  run_pipeline<2>((p.items + kDepth<T> - 1) / kDepth<T>, copy, samples, [&](int, int stage, int) {
    multiply_tiles<T, kTensor, W, M>(sums, lane, shared.weights[stage], shared.memory[stage]);
  });
  T* output = static_cast<T*>(p.output);
  sums.pairs([&](int row, int column, float first, float second) {
    const int channel = first_channel + column;
    if (channel >= p.channels || !dense(first_row + row)) return;
    store(output + int64_t{first_row + row} * p.channels + channel, Vec2<T>{narrow<T>(first), narrow<T>(second)});
  });
}

template <class T, bool kTensor>
void start(const MemoryAttention& p, const Device& device) {
  const int64_t rows = blocks_for(p.rows, kWarps);
  launch("memory_attention_weights", &memory_attention_weights_kernel, rows, 1, 1, kThreads, 0, device, p);
  launch("memory_attention_listed", &memory_attention_listed_kernel<T>, rows,
         blocks_for(p.channels, kWarpSize * kVector<T>), 1, kThreads, 0, device, p);
  if (p.max_kept >= p.items) return;  // no list can overflow
  launch("memory_attention_dense", &memory_attention_dense_kernel<T, kTensor>, blocks_for(p.rows, kRows),
         blocks_for(p.channels, kReadChannels<T>), 1, kThreads, 0, device, p);
}

// Online softmax: running max and sum of exponentials.
struct Normalizer {
  float largest = -INFINITY, sum = 0;

  __device__ __forceinline__ void add(float largest_other, float sum_other) {
    const float both = fmaxf(largest, largest_other);
    // NaN logits propagate; an empty part adds nothing.
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

// One warp per row; the row is reread for each of the dependent reductions.
__global__ void __launch_bounds__(kThreads) memory_attention_gradient_kernel(const MemoryAttentionGradient p) {
  constexpr float kDelta = 1e-12f;  // of Eq. 9
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (row >= p.rows) return;  // uniform across the warp
  float* dots = p.dots + row * p.items;
  float* grad_weights = p.grad_weights + row * p.items;
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
    along += sparse * load<float>(grad_weights + item);
  }
  total = sum_lanes(total), along = sum_lanes(along);
  const float scale = p.renormalize && total > 0 ? 1 / total : 1;
  along = p.renormalize ? along * scale : 0;
  // Gradient with respect to a softmax weight, through Eq. 9.
  auto grad_weight = [&](int item, float weight) {
    const float above = weight - p.threshold;
    if (!(above > 0)) return above == above ? 0.0f : above;
    const float slope = above / (above + kDelta) + weight * kDelta / ((above + kDelta) * (above + kDelta));
    return (load<float>(grad_weights + item) - along) * scale * slope;
  };
  float inner = 0;
  for (int item = lane; item < p.items; item += kWarpSize) {
    const float own = weight(item);
    inner += own * grad_weight(item, own);
  }
  inner = sum_lanes(inner);
  for (int item = lane; item < p.items; item += kWarpSize) {
    const float own = weight(item), product = norms(item), cos = cosine(item);
    const float grad_cosine = own * (grad_weight(item, own) - inner) / p.temperature;
    store(p.pull + row * p.items + item, product > kEpsilon ? grad_cosine * cos : 0);
    store(grad_weights + item, shrink(own, p.threshold) * scale);
    store(dots + item, grad_cosine / fmaxf(product, kEpsilon));
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
