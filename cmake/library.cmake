# SPDX-License-Identifier: MIT
# The target deep_ep.

find_package(fmt REQUIRED)
# A wheel is moved to machines that may have another fmt, or none.
set(ep_fmt $<IF:$<BOOL:${DEEP_EP_PYTHON}>,fmt::fmt-header-only,fmt::fmt>)
find_package(Threads REQUIRED)

# Globbed, so that a new file is a new file and nothing else; CONFIGURE_DEPENDS looks again at each build.
file(GLOB_RECURSE ep_sources CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/src/*.cpp")
list(FILTER ep_sources EXCLUDE REGEX "/src/cuda/")

# The row loops are compiled three times, and rows.cpp chooses at run time: for every CPU, for x86-64 with AVX2, FMA and F16C, and with
# AVX-512 as well.
# Only the extensions that it asks the CPU for, and only in that file. -O3 because these loops must be vectorised.
set(ep_rows_baseline "${PROJECT_SOURCE_DIR}/src/host/rows_baseline.cpp")
set(ep_rows_v3 "${PROJECT_SOURCE_DIR}/src/host/rows_v3.cpp")
set(ep_rows_v4 "${PROJECT_SOURCE_DIR}/src/host/rows_v4.cpp")
set(ep_rows_flags "$<$<NOT:$<CONFIG:Debug>>:-O3>")
set_source_files_properties("${ep_rows_baseline}" PROPERTIES COMPILE_OPTIONS "${ep_rows_flags}")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  set_source_files_properties("${ep_rows_v3}" PROPERTIES COMPILE_OPTIONS "${ep_rows_flags};-mavx2;-mfma;-mf16c")
  # g++ 12 takes the undefined registers inside its own AVX-512 intrinsics for a mistake of ours (GCC bug 105593).
  set_source_files_properties(
    "${ep_rows_v4}" PROPERTIES COMPILE_OPTIONS "${ep_rows_flags};-mavx2;-mfma;-mf16c;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-Wno-maybe-uninitialized")
else()
  list(REMOVE_ITEM ep_sources "${ep_rows_v3}" "${ep_rows_v4}")
endif()

# libfabric, the network between nodes: its headers at build time, where they are; the library itself is opened at run time
# (src/net/libfabric_library.h says why), so nothing is linked and a wheel works with it and without.
find_path(ep_libfabric_include rdma/fi_endpoint.h)
if(NOT ep_libfabric_include)
  message(STATUS "deep_ep: no network between nodes, libfabric's headers are missing (libfabric-dev)")
  list(FILTER ep_sources EXCLUDE REGEX "/src/net/libfabric[^/]*\\.cpp$")
endif()

add_library(deep_ep ${ep_sources})
add_library(deep_ep::deep_ep ALIAS deep_ep)
set_target_properties(deep_ep PROPERTIES VERSION "${PROJECT_VERSION}" SOVERSION "${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}")
target_compile_features(deep_ep PUBLIC cxx_std_20)
target_include_directories(
  deep_ep
  PUBLIC "$<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>" "$<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>"
  PRIVATE "${PROJECT_SOURCE_DIR}/src")
# rt holds shm_open in C libraries older than glibc 2.34.
target_link_libraries(deep_ep PRIVATE ${ep_fmt} Threads::Threads ${CMAKE_DL_LIBS} $<$<PLATFORM_ID:Linux>:rt>)
if(ep_libfabric_include)
  target_compile_definitions(deep_ep PRIVATE EP_WITH_LIBFABRIC=1)
  target_include_directories(deep_ep SYSTEM PRIVATE "${ep_libfabric_include}")
endif()
