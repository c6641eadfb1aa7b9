// The software pipeline of a product of tiles: one loop, into which producers bring the tiles.
#pragma once

#include "tile.cuh"

namespace bkd {
namespace {

// While a step is multiplied, the copies of the kStages - 1 next ones arrive, and the samples of the next one are on
// their way from memory through registers.
//
// copy(stage, first): start the copies of the first step, or of the step after the one copied last. samples: next(more)
// moves to the next step, if there is one more, fetch(turn) loads a part of it into registers, put(turn, buffer)
// interpolates that into one of two buffers.
// multiply(turn, stage, buffer): the turn's part of the product.
template <int kStages, class Copy, class Samples, class Multiply>
__device__ __forceinline__ void run_pipeline(int steps, Copy copy, Samples& samples, Multiply multiply) {
  constexpr int kTurns = Samples::kTurns;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) copy(stage, stage == 0);
    commit_copies();  // one group a step, even if it is empty, so that waits count steps
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    samples.fetch(turn);
    samples.put(turn, 0);
  }
  int stage = 0, free_stage = kStages - 1;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int buffer = step & 1;
    wait_for_copies<kStages - 2>();
    __syncthreads();
    samples.next(step + 1 < steps);
    if (step + kStages - 1 < steps) copy(free_stage, false);
    commit_copies();
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      samples.fetch(turn);
      multiply(turn, stage, buffer);
      samples.put(turn, buffer ^ 1);
    }
    free_stage = stage;
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
}

// Samples of a product whose tiles are both copied.
struct NoSamples {
  static constexpr int kTurns = 1;
  __device__ __forceinline__ void next(bool) {}
  __device__ __forceinline__ void fetch(int) {}
  __device__ __forceinline__ void put(int, int) {}
};

}  // namespace
}  // namespace bkd
