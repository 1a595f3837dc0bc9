# SPDX-License-Identifier: MIT
# The CUDA backend: adds src/cuda to the target deep_ep.
include(CheckLanguage)

find_program(ep_nvcc NAMES nvcc HINTS ENV CUDACXX PATHS /usr/local/cuda/bin)
if(NOT ep_nvcc AND NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "DEEP_EP_CUDA is ON, but nvcc was not found; set CMAKE_CUDA_COMPILER to its path")
elseif(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "${ep_nvcc}")
endif()

# Ampere, Hopper, Blackwell, as far as this nvcc knows them. Decided before CMake tries the compiler with one of them.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch OUTPUT_VARIABLE ep_known_archs COMMAND_ERROR_IS_FATAL ANY)
  set(ep_archs "")
  foreach(arch IN ITEMS 80 90 100)
    if(ep_known_archs MATCHES "compute_${arch}[\r\n]")
      list(APPEND ep_archs ${arch})
    endif()
  endforeach()
  set(CMAKE_CUDA_ARCHITECTURES "${ep_archs}" CACHE STRING "GPU architectures" FORCE)
endif()
enable_language(CUDA)
# CMake 3.25.1, Debian 12's, does not know yet that nvcc has C++20, and would refuse the target's cxx_std_20.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
find_package(CUDAToolkit REQUIRED)

file(GLOB_RECURSE ep_cuda_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/src/cuda/*.cu" "${PROJECT_SOURCE_DIR}/src/cuda/*.cpp")
if(NOT ep_cuda_sources)
  message(STATUS "deep_ep: no CUDA sources yet, the library has the host backend only")
  return()
endif()
list(LENGTH ep_cuda_sources ep_num_cuda_sources)
message(STATUS "deep_ep: ${ep_num_cuda_sources} CUDA sources for sm ${CMAKE_CUDA_ARCHITECTURES}")

# The target was made before the architectures were known.
set_target_properties(
  deep_ep PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}")
target_sources(deep_ep PRIVATE ${ep_cuda_sources})
target_compile_definitions(deep_ep PRIVATE EP_WITH_CUDA=1)
# As on the host: no contraction, so that both backends give the same bits.
target_compile_options(deep_ep PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;--expt-relaxed-constexpr;-Xcompiler=-Wall,-Wextra,-ffp-contract=off>")
target_link_libraries(deep_ep PRIVATE CUDA::cudart_static)
target_include_directories(deep_ep PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
