// Kernels that sum over all rows, or over what the blocks of another kernel have summed up. By one block, the blocks of
// a cluster, or blocks whose sums a second kernel adds; always in a fixed order.

#include "sums.cuh"

namespace ce::cuda {
namespace {

constexpr int kSumThreads = 512;
// Rows that one block sums, and a cluster.
constexpr int64_t kOneBlock = 1 << 11;
constexpr int64_t kOneCluster = 1 << 17;
constexpr int kCluster = 8;

template <typename A>
CE_DEVICE RowSums sums_of(const Problem& p, int64_t row, bool losses, bool weights) {
  RowSums sums;
  if (losses) {
    // Without row weights any order will do.
    const int64_t offset = p.row_weight.data ? row_offset(p, row, p.row_strides) : row;
    sums.loss = row_value<A>(p, p.row_weight, row, 1) * static_cast<const A*>(p.loss)[offset];
  }
  if (weights) {
    sums.weight = weight_of_row<A>(p, row);
  }
  return sums;
}

// For the first warp's threads.
CE_DEVICE RowSums sum_in_block(RowSums sums) {
  RowSums* const shared = static_cast<RowSums*>(shared_memory());
  sums = sum_in_warp(sums);
  if (threadIdx.x % kWarp == 0) {
    shared[threadIdx.x / kWarp] = sums;
  }
  __syncthreads();
  return threadIdx.x < kWarp ? sum_in_warp(threadIdx.x < kSumThreads / kWarp ? shared[threadIdx.x] : RowSums()) : sums;
}

// The same of a cluster.
CE_DEVICE RowSums sum_in_cluster(RowSums sums) {
  RowSums* const mine = static_cast<RowSums*>(shared_memory()) + kSumThreads / kWarp;
  if (threadIdx.x == 0) {
    *mine = sums;
  }
  cluster_barrier();
  if (threadIdx.x < kWarp) {
    sums = sum_in_warp(threadIdx.x < kCluster ? *in_block(mine, threadIdx.x) : RowSums());
  }
  cluster_barrier();  // nobody leaves before all have read
  return sums;
}

// Adds up f(i) for a thread's part of `count`, which are taken in turn by so many threads.
template <typename F>
CE_DEVICE RowSums sum_turns(int64_t thread, int64_t threads, int64_t count, F&& f) {
  constexpr int kBatch = 8;  // that a thread has under way together
  RowSums sums;
  for (int64_t first = thread; first < count; first += kBatch * threads) {
    RowSums batch[kBatch];
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (first + i * threads < count) {
        batch[i] = f(first + i * threads);
      }
    }
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      add(sums, batch[i]);
    }
  }
  return sums;
}

template <typename A>
__global__ void __launch_bounds__(kSumThreads)
    sum_all_rows(const __grid_constant__ Problem p, const __grid_constant__ bool losses,
                 const __grid_constant__ bool weights, const __grid_constant__ bool cluster) {
  wait_for_previous();
  let_next_start();
  RowSums sums = sum_turns(static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x,
                           static_cast<int64_t>(gridDim.x) * kSumThreads, p.rows,
                           [&](int64_t row) { return sums_of<A>(p, row, losses, weights); });
  sums = sum_in_block(sums);
  if (cluster) {
    sums = sum_in_cluster(sums);
  }
  if (threadIdx.x == 0) {
    if (!cluster && gridDim.x > 1) {
      Workspace(p.workspace).sums()[blockIdx.x] = sums;
    } else if (blockIdx.x == 0) {
      write_sums<A>(p, sums, losses, weights);
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kSumThreads)
    sum_partial(const __grid_constant__ Problem p, const __grid_constant__ int blocks,
                const __grid_constant__ bool losses, const __grid_constant__ bool weights) {
  wait_for_previous();
  let_next_start();
  const RowSums* const partial = Workspace(p.workspace).sums();
  const RowSums sums =
      sum_in_block(sum_turns(threadIdx.x, kSumThreads, blocks, [&](int64_t block) { return partial[block]; }));
  if (threadIdx.x == 0) {
    write_sums<A>(p, sums, losses, weights);
  }
}

constexpr int64_t kShared = (kSumThreads / kWarp + 1) * sizeof(RowSums);

template <typename A>
void sum_blocks(const Problem& p, int blocks, bool losses, bool weights, Stream stream) {
  launch(sum_partial<A>, {1, kSumThreads, 1, kShared, /*early=*/true}, stream, p, blocks, losses, weights);
}

template <typename A>
void sum_rows(const Problem& p, bool losses, bool weights, Stream stream) {
  const bool cluster = p.rows > kOneBlock && p.rows <= kOneCluster && current_device().max_cluster >= kCluster;
  const int blocks = p.rows <= kOneBlock ? 1 : cluster ? kCluster : kSumBlocks;
  const Grid grid{blocks, kSumThreads, cluster ? kCluster : 1, kShared, /*early=*/true};
  launch(sum_all_rows<A>, grid, stream, p, losses, weights, cluster);
  if (blocks > 1 && !cluster) {
    sum_blocks<A>(p, blocks, losses, weights, stream);
  }
}

}  // namespace

void sum_tiles(const Problem& p, int tiles, Stream stream) {
  const bool weights = p.divides_by_weight && !p.grad.data;
  p.dtype == DType::kFloat64 ? sum_blocks<double>(p, tiles, /*losses=*/true, weights, stream)
                             : sum_blocks<float>(p, tiles, /*losses=*/true, weights, stream);
}

void sum_rows(const Problem& p, bool losses, Stream stream) {
  // A gradient in the forward pass has needed the divisor before.
  const bool weights = p.divides_by_weight && !(losses && p.grad.data);
  p.dtype == DType::kFloat64 ? sum_rows<double>(p, losses, weights, stream)
                             : sum_rows<float>(p, losses, weights, stream);
}

int64_t workspace_size(const Problem& p) {
  const bool keeps_rows = p.grad.data && !p.max && has_gradient_pass(p, plan_forward(p, current_device()));
  return Workspace::kRows + (keeps_rows ? Workspace::bytes_of_rows(p.rows) : 0);
}

}  // namespace ce::cuda
