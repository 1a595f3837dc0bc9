// SPDX-License-Identifier: MIT
// How a function of plan/ is marked so that host code, device code and every instruction set may share it.
#pragma once

#ifdef __CUDACC__
#define EP_HOST_DEVICE __host__ __device__
#else
#define EP_HOST_DEVICE
#endif

// An inline function that leaves no copy of its own in the object file, even at -O0. Needed where one header is
// compiled for several instruction sets: of two weak copies the linker keeps either, and an AVX2 copy kept for the
// baseline is an illegal instruction.
#define EP_ALWAYS_INLINE inline __attribute__((always_inline))
