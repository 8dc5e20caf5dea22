// How the threads that share a row walk through it.
//
// A walk cuts a row into pieces: sixteen aligned bytes where the classes lie next to each other (Along), single
// elements where they do not (Across). What lies before the first and behind the last whole piece are its edges. The
// pieces go to the threads in turn, so that neighbours read neighbours.
#pragma once

#include "launch.cuh"

namespace ce::cuda {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  static constexpr int kSize = kCount;
  T elements[kCount];
};

// Pieces that are read `once`, and those written for somebody who will read them much later, need no place in the
// caches.
template <typename T, int kSize>
CE_DEVICE Piece<T, kSize> load(const T* address, bool once = true) {
  Piece<T, kSize> piece;
  if constexpr (sizeof(piece) == sizeof(uint4)) {
    const uint4* const vector = reinterpret_cast<const uint4*>(address);
    const uint4 bits = once ? __ldcs(vector) : *vector;
    memcpy(&piece, &bits, sizeof(piece));
  } else {
    static_assert(kSize == 1);
    piece.elements[0] = *address;
  }
  return piece;
}

template <typename T, int kSize>
CE_DEVICE void store(T* address, const Piece<T, kSize>& piece) {
  if constexpr (sizeof(piece) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &piece, sizeof(piece));
    __stcs(reinterpret_cast<uint4*>(address), bits);
  } else {
    static_assert(kSize == 1);
    *address = piece.elements[0];
  }
}

// The place of a thread among those that share its row.
struct Seat {
  int row;    // of the block's rows
  int lane;   // of the row's threads in this block
  int block;  // of the row's blocks
};

// The blocks that take all rows.
inline int64_t blocks_for(const Problem& p, const Plan& plan) {
  const int64_t tiles = (p.rows + plan.rows() - 1) / plan.rows();
  return std::min({tiles, plan.tiles, kMaxBlocks / plan.blocks}) * plan.blocks;
}

// The first row of a block's first tile, and how far it is to the next.
CE_DEVICE int64_t first_row(const Plan& plan) {
  return blockIdx.x / plan.blocks * static_cast<int64_t>(plan.rows());
}
CE_DEVICE int64_t row_step(const Plan& plan) {
  return gridDim.x / plan.blocks * static_cast<int64_t>(plan.rows());
}

// Walks along classes that lie next to each other.
template <typename T>
class Along {
 public:
  using Element = T;
  static constexpr int kSize = 16 / sizeof(T);
  static constexpr int kBatch = 4;  // pieces that a thread has under way together

  CE_DEVICE static Seat seat(const Plan& plan) {
    const int thread = threadIdx.x;
    return {thread / plan.lanes, thread % plan.lanes, static_cast<int>(blockIdx.x % plan.blocks)};
  }

  CE_DEVICE Along(const void* data, int64_t offset, int64_t /*class_stride*/, int64_t classes)
      : data_(static_cast<const T*>(data) + offset) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(data_) % 16 / sizeof(T));
    head_ = misaligned == 0 ? 0 : kSize - misaligned;
    head_ = classes < head_ ? static_cast<int>(classes) : head_;
    pieces_ = (classes - head_) / kSize;
    edges_ = static_cast<int>(classes - pieces_ * kSize);
  }

  CE_DEVICE int64_t pieces() const { return pieces_; }
  CE_DEVICE int edges() const { return edges_; }
  CE_DEVICE int64_t class_of(int64_t piece) const { return head_ + piece * kSize; }
  CE_DEVICE int64_t class_of_edge(int edge) const { return edge < head_ ? edge : edge + pieces_ * kSize; }

  template <int kCount>
  CE_DEVICE Piece<T, kCount> read(int64_t c, bool once = true) const {
    return load<T, kCount>(data_ + c, once);
  }

 private:
  const T* data_;
  int64_t pieces_;
  int head_, edges_;
};

// Walks across rows: neighbouring threads take neighbouring rows, each at its own classes.
template <typename T>
class Across {
 public:
  using Element = T;
  static constexpr int kSize = 1;
  static constexpr int kBatch = 8;

  CE_DEVICE static Seat seat(const Plan& plan) {
    const int thread = threadIdx.x;
    return {thread % plan.rows(), thread / plan.rows(), static_cast<int>(blockIdx.x % plan.blocks)};
  }

  CE_DEVICE Across(const void* data, int64_t offset, int64_t class_stride, int64_t classes)
      : data_(static_cast<const T*>(data) + offset), stride_(class_stride), pieces_(classes) {}

  CE_DEVICE int64_t pieces() const { return pieces_; }
  CE_DEVICE int edges() const { return 0; }
  CE_DEVICE int64_t class_of(int64_t piece) const { return piece; }
  CE_DEVICE int64_t class_of_edge(int edge) const { return edge; }

  template <int kCount>
  CE_DEVICE Piece<T, kCount> read(int64_t c, bool once = true) const {
    return load<T, kCount>(data_ + c * stride_, once);
  }

 private:
  const T* data_;
  int64_t stride_, pieces_;
};

// Calls f with the walk that the logits' layout asks for.
template <typename F>
void dispatch_walk(const Problem& p, F&& f) {
  dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    walks_along(p) ? f(static_cast<Along<T>*>(nullptr)) : f(static_cast<Across<T>*>(nullptr));
  });
}

// Calls f(c, piece) for this thread's part of a row, from class c on; first for its edges, whose pieces have one
// element. `read(c, turn)` is how to get the whole pieces, the turn-th of this thread's;
// `kBatch` of them are under way together.
template <int kBatch, typename Walk, typename Read, typename F>
CE_DEVICE void for_each_piece(const Walk& walk, int64_t rank, int64_t ranks, Read&& read, F&& f) {
  using Whole = Piece<typename Walk::Element, Walk::kSize>;
  for (int64_t edge = rank; edge < walk.edges(); edge += ranks) {
    const int64_t c = walk.class_of_edge(static_cast<int>(edge));
    f(c, walk.template read<1>(c));
  }
  const int turns = rank < walk.pieces() ? static_cast<int>((walk.pieces() - rank - 1) / ranks + 1) : 0;
  int64_t c = walk.class_of(rank);
  const int64_t step = ranks * Walk::kSize;
  for (int turn = 0; turn < turns; turn += kBatch, c += kBatch * step) {
    Whole batch[kBatch];
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (turn + i < turns) {
        batch[i] = read(c + i * step, turn + i);
      }
    }
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (turn + i < turns) {
        f(c + i * step, batch[i]);
      }
    }
  }
}

// The same, read from memory.
template <typename Walk, typename F>
CE_DEVICE void for_each_piece(const Walk& walk, int64_t rank, int64_t ranks, F&& f) {
  for_each_piece<Walk::kBatch>(
      walk, rank, ranks, [&](int64_t c, int) { return walk.template read<Walk::kSize>(c); }, f);
}

// An operand that is taken where a walk over the logits happens to be: in whole pieces if it lies as they do.
template <typename T>
class Companion {
 public:
  CE_DEVICE Companion(T* data, int64_t class_stride) : data_(data), stride_(class_stride) {}

  template <int kSize>
  CE_DEVICE void read(int64_t c, std::remove_const_t<T> (&elements)[kSize]) const {
    if (is_whole<kSize>(c)) {
      const auto piece = load<std::remove_const_t<T>, kSize>(data_ + c);
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        elements[i] = piece.elements[i];
      }
    } else {
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        elements[i] = data_[(c + i) * stride_];
      }
    }
  }

  template <int kSize>
  CE_DEVICE void write(int64_t c, const Piece<T, kSize>& piece) const {
    if (is_whole<kSize>(c)) {
      store(data_ + c, piece);
    } else {
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        data_[(c + i) * stride_] = piece.elements[i];
      }
    }
  }

 private:
  template <int kSize>
  CE_DEVICE bool is_whole(int64_t c) const {
    return kSize > 1 && stride_ == 1 && reinterpret_cast<uintptr_t>(data_ + c) % (sizeof(T) * kSize) == 0;
  }

  T* data_;
  int64_t stride_;
};

template <typename T, int kSize>
CE_DEVICE void unpack(const Piece<T, kSize>& piece, Acc<T> (&values)[kSize]) {
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    values[i] = to_accumulator(piece.elements[i]);
  }
}

template <typename T, int kSize>
CE_DEVICE Piece<T, kSize> pack(const Acc<T> (&values)[kSize]) {
  Piece<T, kSize> piece;
  CE_UNROLL for (int i = 0; i < kSize; ++i) {
    from_accumulator(values[i], piece.elements[i]);
  }
  return piece;
}

}  // namespace ce::cuda
