// How the threads that share a row walk through it.
//
// A walk cuts a row into pieces: sixteen aligned bytes where the classes lie next to each other (Along), single
// elements where they do not (Across; bundles.cu has another way). What lies before the first and behind the last
// whole piece are its edges. The pieces go to the threads in turn, so that neighbours read neighbours.
#pragma once

#include "launch.cuh"

namespace ce::cuda {

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Piece {
  static constexpr int kSize = kCount;
  T elements[kCount];
};

template <typename T, int kSize>
CE_DEVICE Piece<T, kSize> load(const T* address) {
  Piece<T, kSize> piece;
  note_read(address, sizeof(piece));
  if constexpr (sizeof(piece) == sizeof(uint4)) {
    const uint4 bits = *reinterpret_cast<const uint4*>(address);
    memcpy(&piece, &bits, sizeof(piece));
  } else {
    static_assert(kSize == 1);
    piece.elements[0] = *address;
  }
  return piece;
}

// Whoever will read a gradient will do so much later: it needs no place in the caches.
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

// The place of a thread among those that share its row, which are a power of two.
struct Seat {
  int row;    // of the block's rows
  int lane;   // of the row's threads in this block
  int block;  // of the row's blocks
  int rank;   // of all the row's threads
  int bits;   // there are 2^bits

  CE_DEVICE Seat(int row, int lane, const Plan& plan)
      : row(row),
        lane(lane),
        block(blockIdx.x & (plan.blocks - 1)),
        rank(block * plan.lanes + lane),
        bits(log2_of(plan.lanes) + log2_of(plan.blocks)) {}
};

// The blocks that take all rows.
inline int64_t blocks_for(const Problem& p, const Plan& plan) {
  const int64_t tiles = (p.rows / plan.bundle + plan.rows() - 1) / plan.rows();
  return std::min({tiles, plan.tiles, kMaxBlocks / plan.blocks}) * plan.blocks;
}

// The first row of a block's first tile, and how far it is to the next.
CE_DEVICE int64_t first_row(const Plan& plan) {
  return (blockIdx.x >> log2_of(plan.blocks)) * static_cast<int64_t>(plan.rows());
}
CE_DEVICE int64_t row_step(const Plan& plan) {
  return (gridDim.x >> log2_of(plan.blocks)) * static_cast<int64_t>(plan.rows());
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
    return {thread >> log2_of(plan.lanes), thread & (plan.lanes - 1), plan};
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

  CE_DEVICE const T* address(int64_t c) const { return data_ + c; }
  template <int kCount>
  CE_DEVICE Piece<T, kCount> read(int64_t c) const {
    return load<T, kCount>(address(c));
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
    return {thread & (plan.rows() - 1), thread >> log2_of(plan.rows()), plan};
  }

  CE_DEVICE Across(const void* data, int64_t offset, int64_t class_stride, int64_t classes)
      : data_(static_cast<const T*>(data) + offset), stride_(class_stride), pieces_(classes) {}

  CE_DEVICE int64_t pieces() const { return pieces_; }
  CE_DEVICE int edges() const { return 0; }
  CE_DEVICE int64_t class_of(int64_t piece) const { return piece; }
  CE_DEVICE int64_t class_of_edge(int edge) const { return edge; }

  CE_DEVICE const T* address(int64_t c) const { return data_ + c * stride_; }
  template <int kCount>
  CE_DEVICE Piece<T, kCount> read(int64_t c) const {
    return load<T, kCount>(address(c));
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

// The whole pieces of a row that are this thread's: from class `first` on, `step` classes apart.
template <typename Walk>
struct Turns {
  int64_t first;
  int step, count;

  CE_DEVICE Turns(const Walk& walk, const Seat& seat)
      : first(walk.class_of(seat.rank)),
        step(Walk::kSize << seat.bits),
        count(static_cast<int>((walk.pieces() - seat.rank + (int64_t{1} << seat.bits) - 1) >> seat.bits)) {}

  CE_DEVICE int64_t class_of(int turn) const { return first + int64_t{turn} * step; }
};

// Calls f(c, piece) for this thread's edges of a row, whose pieces have one element, the class c.
template <typename Walk, typename F>
CE_DEVICE void for_each_edge(const Walk& walk, const Seat& seat, F&& f) {
  CE_NO_UNROLL for (int edge = seat.rank; edge < walk.edges(); edge += 1 << seat.bits) {
    const int64_t c = walk.class_of_edge(edge);
    f(c, walk.template read<1>(c));
  }
}

// Calls f(c, batch, count) for this thread's whole pieces from turn to turn, `kBatch` of them under way together: the
// first `count` of a batch are there, of which the first is that of class c. `read(c, turn)` is how to get them.
template <int kBatch, typename Walk, typename Read, typename F>
CE_DEVICE void for_each_batch(const Turns<Walk>& turns, int from, int to, Read&& read, F&& f) {
  using Whole = Piece<typename Walk::Element, Walk::kSize>;
  int turn = from;
  CE_NO_UNROLL for (; turn + kBatch <= to; turn += kBatch) {
    Whole batch[kBatch];
    const int64_t c = turns.class_of(turn);
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      batch[i] = read(c + int64_t{i} * turns.step, turn + i);
    }
    f(c, batch, std::integral_constant<int, kBatch>());
  }
  if (kBatch > 1 && turn < to) {
    Whole batch[kBatch];
    const int64_t c = turns.class_of(turn);
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (turn + i < to) {
        batch[i] = read(c + int64_t{i} * turns.step, turn + i);
      }
    }
    f(c, batch, to - turn);
  }
}

// Calls f(c, piece) for this thread's part of a row, from class c on, the edges first.
template <int kBatch, typename Walk, typename Read, typename F>
CE_DEVICE void for_each_piece(const Walk& walk, const Seat& seat, Read&& read, F&& f) {
  using Whole = Piece<typename Walk::Element, Walk::kSize>;
  for_each_edge(walk, seat, f);
  const Turns<Walk> turns(walk, seat);
  int64_t c = turns.first;
  for (int turn = 0; turn < turns.count; turn += kBatch, c += kBatch * int64_t{turns.step}) {
    Whole batch[kBatch];
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (turn + i < turns.count) {
        batch[i] = read(c + int64_t{i} * turns.step, turn + i);
      }
    }
    CE_UNROLL for (int i = 0; i < kBatch; ++i) {
      if (turn + i < turns.count) {
        f(c + int64_t{i} * turns.step, batch[i]);
      }
    }
  }
}

// The same, read from memory.
template <typename Walk, typename F>
CE_DEVICE void for_each_piece(const Walk& walk, const Seat& seat, F&& f) {
  for_each_piece<Walk::kBatch>(walk, seat, [&](int64_t c, int) { return walk.template read<Walk::kSize>(c); }, f);
}

// An operand that is taken where a walk over the logits happens to be: in whole pieces if it lies as they do.
template <typename T>
class Companion {
 public:
  template <typename Walk>
  CE_DEVICE Companion(T* data, int64_t class_stride, const Walk& walk)
      : data_(data),
        stride_(class_stride),
        is_whole_(class_stride == 1 &&
                  reinterpret_cast<uintptr_t>(data + walk.class_of(0)) % (sizeof(T) * Walk::kSize) == 0) {}

  CE_DEVICE bool is_whole() const { return is_whole_; }
  CE_DEVICE T* address(int64_t c) const { return data_ + c * stride_; }

  template <int kSize>
  CE_DEVICE void read(int64_t c, std::remove_const_t<T> (&elements)[kSize]) const {
    if (kSize > 1 && is_whole_) {
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
    if (kSize > 1 && is_whole_) {
      store(data_ + c, piece);
    } else {
      CE_UNROLL for (int i = 0; i < kSize; ++i) {
        data_[(c + i) * stride_] = piece.elements[i];
      }
    }
  }

 private:
  T* data_;
  int64_t stride_;
  bool is_whole_;
};

template <typename T, int kSize>
CE_DEVICE void unpack(const Piece<T, kSize>& piece, Acc<T> (&values)[kSize]) {
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
    CE_UNROLL for (int i = 0; i < kSize; i += 2) {
      to_accumulators(&piece.elements[i], values[i], values[i + 1]);
    }
  } else {
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      values[i] = to_accumulator(piece.elements[i]);
    }
  }
}

template <typename T, int kSize>
CE_DEVICE Piece<T, kSize> pack(const Acc<T> (&values)[kSize]) {
  Piece<T, kSize> piece;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
    CE_UNROLL for (int i = 0; i < kSize; i += 2) {
      from_accumulators(values[i], values[i + 1], &piece.elements[i]);
    }
  } else {
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      from_accumulator(values[i], piece.elements[i]);
    }
  }
  return piece;
}

// The larger ones of two pieces' elements, NaN left out.
template <typename T, int kSize>
CE_DEVICE Piece<T, kSize> larger(const Piece<T, kSize>& a, const Piece<T, kSize>& b) {
  Piece<T, kSize> result;
  if constexpr (sizeof(T) == 2 && kSize % 2 == 0) {
    CE_UNROLL for (int i = 0; i < kSize; i += 2) {
      larger_pair(&a.elements[i], &b.elements[i], &result.elements[i]);
    }
  } else {
    CE_UNROLL for (int i = 0; i < kSize; ++i) {
      from_accumulator(std::fmax(to_accumulator(a.elements[i]), to_accumulator(b.elements[i])), result.elements[i]);
    }
  }
  return result;
}

// A piece's largest element.
template <typename T, int kSize>
CE_DEVICE Acc<T> largest(const Piece<T, kSize>& piece) {
  Acc<T> values[kSize];
  unpack(piece, values);
  CE_UNROLL for (int step = kSize / 2; step > 0; step /= 2) {
    CE_UNROLL for (int i = 0; i < step; ++i) {
      values[i] = std::fmax(values[i], values[i + step]);
    }
  }
  return values[0];
}

}  // namespace ce::cuda
