# SPDX-License-Identifier: MIT
# The language and the compiler flags of everything built in this tree. None of them reaches a project that uses deep_ep.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_C_STANDARD 11)
set(CMAKE_C_STANDARD_REQUIRED ON)
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE RelWithDebInfo)
endif()
# Functions and lines are what a stack trace shows; the values of optimised variables (-g2) would cost a third more of the build's
# time. CMAKE_BUILD_TYPE=Debug has them.
string(REGEX REPLACE "-g( |$)" "-g1\\1" CMAKE_CXX_FLAGS_RELWITHDEBINFO "${CMAKE_CXX_FLAGS_RELWITHDEBINFO}")
string(REGEX REPLACE "-g( |$)" "-g1\\1" CMAKE_C_FLAGS_RELWITHDEBINFO "${CMAKE_C_FLAGS_RELWITHDEBINFO}")

add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-Wall;-Wextra;-Wpedantic>")
# Results are bit-identical on every machine: a fused multiply-add is written std::fma, the compiler may not make its own.
add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-ffp-contract=off>")

set(ep_sanitize_flags "")
if(DEEP_EP_SANITIZE STREQUAL "address")
  set(ep_sanitize_flags -fsanitize=address,undefined -fno-sanitize-recover=all)
elseif(DEEP_EP_SANITIZE STREQUAL "thread")
  set(ep_sanitize_flags -fsanitize=thread)
elseif(DEEP_EP_SANITIZE)
  message(FATAL_ERROR "DEEP_EP_SANITIZE is '${DEEP_EP_SANITIZE}', but must be empty, address or thread")
endif()
if(ep_sanitize_flags)
  add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:${ep_sanitize_flags};-fno-omit-frame-pointer>")
  # -Og: g++ takes three times as long to optimise what a sanitizer has instrumented, and optimising hides accesses from it.
  add_compile_options("$<$<AND:$<COMPILE_LANGUAGE:C,CXX>,$<NOT:$<CONFIG:Debug>>>:-Og>")
  add_link_options(${ep_sanitize_flags})
endif()
