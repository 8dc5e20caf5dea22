// What the blocks of a cluster have in common: a barrier, each other's shared memory, messages. Chips without clusters
// are never asked to launch one.
#pragma once

#include "launch.cuh"

namespace ce::cuda {

// An arrival barrier in a block's shared memory: it counts the bytes that the blocks of a cluster send there, turn by
// turn. One thread begins it, and it is there for other blocks after a barrier of the cluster.
using Arrivals = uint64_t;

#ifdef CE_CLUSTERS
constexpr bool kHasClusters = true;
CE_DEVICE void cluster_arrive() {
  __cluster_barrier_arrive();
}
// Without making this thread's writes visible first, which takes time.
CE_DEVICE void cluster_arrive_relaxed() {
#ifdef CE_EMULATE
  __cluster_barrier_arrive();
#else
  __cluster_barrier_arrive_relaxed();
#endif
}
CE_DEVICE void cluster_wait() {
  __cluster_barrier_wait();
}
// Where the block `rank` has in its shared memory what this block has at `address`.
template <typename P>
CE_DEVICE const P* in_block(const P* address, unsigned rank) {
  return static_cast<const P*>(__cluster_map_shared_rank(address, rank));
}

#ifdef CE_EMULATE
CE_DEVICE void begin_arrivals(Arrivals* arrivals) {
  emulator::mbarrier_init(arrivals, 1);
}
CE_DEVICE void expect_arrivals(Arrivals* arrivals, int bytes) {
  emulator::mbarrier_arrive_expect(arrivals, bytes);
}
CE_DEVICE void wait_for_arrivals(Arrivals* arrivals, int parity) {
  emulator::mbarrier_wait(arrivals, parity);
}
template <typename V>
CE_DEVICE void send(const V& value, V* address, Arrivals* arrivals, unsigned rank) {
  emulator::store_async(__cluster_map_shared_rank(address, rank), &value, sizeof(V),
                        __cluster_map_shared_rank(arrivals, rank));
}
#else
CE_DEVICE void begin_arrivals(Arrivals* arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(address_in_shared(arrivals)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// So many bytes are to come in the next turn.
CE_DEVICE void expect_arrivals(Arrivals* arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address_in_shared(arrivals)), "r"(bytes)
               : "memory");
}
// Until all have come, of a turn with an even number where `parity` is 0, with an odd one where it is 1.
CE_DEVICE void wait_for_arrivals(Arrivals* arrivals, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred arrived;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 arrived, [%0], %1;\n"
      "@!arrived bra again;\n"
      "}" ::"r"(address_in_shared(arrivals)),
      "r"(parity)
      : "memory");
}
// To where block `rank` has what this one has at `address`.
template <typename V>
CE_DEVICE void send(const V& value, V* address, Arrivals* arrivals, unsigned rank) {
  unsigned to, counted_by;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address_in_shared(address)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counted_by) : "r"(address_in_shared(arrivals)), "r"(rank));
  uint64_t words[sizeof(V) / sizeof(uint64_t)];
  static_assert(sizeof(words) == sizeof(V));
  memcpy(words, &value, sizeof(V));
  if constexpr (sizeof(V) == sizeof(uint64_t)) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(to), "l"(words[0]),
                 "r"(counted_by)
                 : "memory");
  } else {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b64 [%0], {%1, %2}, [%3];" ::"r"(to),
                 "l"(words[0]), "l"(words[1]), "r"(counted_by)
                 : "memory");
  }
}
#endif
#else
constexpr bool kHasClusters = false;
CE_DEVICE void cluster_arrive() {}
CE_DEVICE void cluster_arrive_relaxed() {}
CE_DEVICE void cluster_wait() {}
CE_DEVICE void begin_arrivals(Arrivals*) {}
CE_DEVICE void expect_arrivals(Arrivals*, int) {}
CE_DEVICE void wait_for_arrivals(Arrivals*, int) {}
template <typename V>
CE_DEVICE void send(const V&, V*, Arrivals*, unsigned) {}
template <typename P>
CE_DEVICE const P* in_block(const P* address, unsigned) {
  return address;
}
#endif
CE_DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// By all threads of a cluster: the arrivals of a first turn, which others may send to after cluster_wait().
CE_DEVICE void open_arrivals(Arrivals* arrivals, int bytes) {
  if (threadIdx.x == 0) {
    begin_arrivals(arrivals);
    expect_arrivals(arrivals, bytes);
  }
  cluster_arrive_relaxed();  // begin_arrivals() has made visible what it has written
}

}  // namespace ce::cuda
