# SPDX-License-Identifier: MIT
# What `cmake --install` writes, so that find_package(deep_ep) works from another project (tests/install shows it).
include(CMakePackageConfigHelpers)

install(TARGETS deep_ep EXPORT deep_ep-targets)
install(DIRECTORY "${PROJECT_SOURCE_DIR}/include/" DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" FILES_MATCHING PATTERN "*.h")

set(ep_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/deep_ep")
install(EXPORT deep_ep-targets NAMESPACE deep_ep:: DESTINATION "${ep_package_dir}")
configure_package_config_file(
  "${PROJECT_SOURCE_DIR}/cmake/deep_ep-config.cmake.in" "${PROJECT_BINARY_DIR}/cmake/deep_ep-config.cmake"
  INSTALL_DESTINATION "${ep_package_dir}")
# Before 1.0 a minor version may change the API.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/cmake/deep_ep-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/cmake/deep_ep-config.cmake" "${PROJECT_BINARY_DIR}/cmake/deep_ep-config-version.cmake"
        DESTINATION "${ep_package_dir}")
