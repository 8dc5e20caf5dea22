// Includes the file CE_ISA_FILE once for each instruction set that the kernels are compiled for, each time in a
// namespace CE_ISA of its own and with vectors of CE_VECTOR_BYTES, so that one binary serves every processor.
// Afterwards CE_PICK_ISA(name) is `name` of the widest instruction set that the running processor has.
//
// What is included must not be the first to use an inline function of another header that is not forced inline: the
// linker could keep that copy, compiled for the wider instruction set, for every caller.

#if defined(__x86_64__)

#ifdef CE_SANITIZE
// The sanitizers do not see the masked loads and stores that AVX-512 has beyond AVX2, and take long to compile.
namespace ce::cpu {
namespace avx2 {}
namespace avx512 = avx2;
}  // namespace ce::cpu
#else
#define CE_ISA avx512
#define CE_VECTOR_BYTES 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,prefer-vector-width=512")
#endif
#include CE_ISA_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CE_ISA
#undef CE_VECTOR_BYTES
#endif

#define CE_ISA avx2
#define CE_VECTOR_BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include CE_ISA_FILE
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CE_ISA
#undef CE_VECTOR_BYTES

#define CE_PICK_ISA(name)                      \
  (::ce::cpu::isa() == ::ce::cpu::Isa::kAvx512 \
       ? avx512::name                          \
       : (::ce::cpu::isa() == ::ce::cpu::Isa::kAvx2 ? avx2::name : portable::name))

#else

#define CE_PICK_ISA(name) portable::name

#endif

#define CE_ISA portable
#define CE_VECTOR_BYTES 16
#include CE_ISA_FILE
#undef CE_ISA
#undef CE_VECTOR_BYTES
