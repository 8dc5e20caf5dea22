// Targets out of bounds: kernels report them to memory that the host reads without waiting for the device.

#include <atomic>
#include <mutex>
#include <new>

#include "launch.cuh"

namespace ce::cuda {
namespace {

constexpr int kMaxDevices = 64;

BadTarget* allocate_records() {
#ifdef CE_EMULATE
  void* memory = ::operator new(kMaxDevices * sizeof(BadTarget));
#else
  void* memory = nullptr;
  // The first call may be in the middle of a graph capture, which such an allocation must not disturb.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  const cudaError_t status =
      cudaHostAlloc(&memory, kMaxDevices * sizeof(BadTarget), cudaHostAllocPortable | cudaHostAllocMapped);
  check(cudaThreadExchangeStreamCaptureMode(&mode));
  check(status);
#endif
  return new (memory) BadTarget[kMaxDevices];
}

std::atomic<uint64_t> reporting{0};  // a bit for each device

}  // namespace

BadTarget* bad_target(int device) {
  static BadTarget* const records = allocate_records();
  if (device < 0 || device >= kMaxDevices) {
    return nullptr;
  }
  reporting |= uint64_t{1} << device;
  return records + device;
}

std::vector<int> reporting_devices() {
  std::vector<int> devices;
  for (int device = 0; device < kMaxDevices; ++device) {
    if (reporting >> device & 1) {
      devices.push_back(device);
    }
  }
  return devices;
}

BadTarget take_bad_target(int device) {
  static std::mutex mutex;
  BadTarget* const record = bad_target(device);
  BadTarget taken;
  if (!record || __atomic_load_n(&record->row, __ATOMIC_RELAXED) == taken.row) {
    return taken;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  taken.row = __atomic_load_n(&record->row, __ATOMIC_ACQUIRE);  // kernels write the target before
  taken.target = record->target;
  __atomic_store_n(&record->row, INT64_MAX, __ATOMIC_RELAXED);
  return taken;
}

void synchronize() {
#ifndef CE_EMULATE
  check(cudaDeviceSynchronize());
#endif
}

}  // namespace ce::cuda
