// Which threads take which rows.
#pragma once

#include "../kernels.h"
#include "../max_sum.h"

namespace ce::cuda {

// What the choice depends on, besides the problem.
struct Device {
  int multiprocessors;
  int shared_memory;  // bytes that a block may have
  int max_cluster;    // blocks; 1 where there are no clusters
  bool starts_early;  // whether a kernel may start before the one before it has ended
};

CE_HOST_DEVICE int log2_of(int power) {
#ifdef __CUDA_ARCH__
  return 31 - __clz(power);
#else
  return __builtin_ctz(static_cast<unsigned>(power));
#endif
}

struct Plan {
  int threads = 256;     // of a block; a power of two
  int lanes = 32;        // threads of a block that share a row; a power of two
  int blocks = 1;        // that share a row; a power of two; of single rows more than one only where lanes = threads
  bool cluster = false;  // whether those are one cluster; otherwise a second kernel merges what they find
  int kept = 0;          // pieces that each thread keeps in shared memory for the gradient; 0: none

  bool reads_all = false;     // also ignored rows: short ones are read before their target has arrived
  bool sums = false;          // each tile sums up its rows' losses and weights, for sum_tiles()
  int64_t tiles = INT64_MAX;  // of rows that run at a time, at most; their blocks go on with the next
  int bundle = 1;             // neighbouring rows that a thread takes together: if more, what is said is of bundles

  CE_HOST_DEVICE int rows() const { return threads >> log2_of(lanes); }  // of a block, a tile
};

// Whether threads walk along a row, whose classes lie next to each other, or across rows.
inline bool walks_along(const Problem& p) {
  return p.logits.class_stride == 1;
}

// For the forward pass, with or without the gradient in it, and for a pass that maps each logit to its gradient.
Plan plan_forward(const Problem&, const Device&);
Plan plan_backward(const Problem&, const Device&);

constexpr int kBundleThreads = 128;  // of a block that takes bundles, at most

// Whether what blocks find of a row is left to a second kernel.
inline bool merges_parts(const Plan& plan) {
  return plan.blocks > 1 && !plan.cluster;
}

// Whether the gradient of a forward pass takes a pass of its own: of rows that blocks share without a cluster, and of
// those whose copies of all pieces nobody has room for.
bool has_gradient_pass(const Problem&, const Plan&);

// What the functions of kernels.h do with the plans for the current device.
void forward(const Problem&, const Plan&, Stream);
void backward(const Problem&, const Plan&, Stream);

// The forward pass of rows that keep their pieces for the gradient, of calls that are not general.
void forward_grad(const Problem&, const Plan&, Stream);

// Passes of rows that are taken in bundles, and the bytes of shared memory of such a forward pass.
void forward_bundles(const Problem&, const Plan&, Stream);
void backward_bundles(const Problem&, const Plan&, Stream);
int64_t memory_of_bundles(const Problem&, const Plan&);

// The steps that they share. The divisor of the mean, where it is the kept rows' weight, and, with `losses`, `total`:
void sum_rows(const Problem&, bool losses, Stream);
// The same from what the tiles of a forward pass have summed up, if there is more than one.
void sum_tiles(const Problem&, int tiles, Stream);
// The gradient of the logits, where the divisor is known.
void map_gradient(const Problem&, const Plan&, Stream);
// With picks: before a pass over the classes, and after one that writes their gradient.
void gather_picks(const Problem&, Stream);
void write_picks(const Problem&, Stream);
// With a teacher: the rows of a forward pass, and the gradient of the logits or of the teacher's.
void diverge(const Problem&, const Plan&, Stream);
void map_divergence_gradient(const Problem&, const Plan&, bool of_teacher, Stream);

}  // namespace ce::cuda
