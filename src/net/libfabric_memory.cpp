// SPDX-License-Identifier: MIT
#include "net/libfabric_memory.h"

#include <fmt/format.h>
#include <sys/uio.h>

#include "check.h"

namespace deep_ep::net {

FidPtr<fid_mr> LibfabricMemory::registered(const Memory& memory, std::uint64_t access) {
  const std::size_t width = objects_.info->domain_attr->mr_key_size;
  iovec where{memory.base, memory.bytes};
  fi_mr_attr attributes{};
  attributes.mr_iov = &where;
  attributes.iov_count = 1;
  attributes.access = access;
  fid_mr* registration = nullptr;
  std::int64_t result = -FI_ENOKEY;
  for (int i = 0; i < 16 && result == -FI_ENOKEY; ++i) {
    attributes.requested_key = width >= 8 ? random_() : random_() & ((std::uint64_t{1} << 8 * width) - 1);
    result = fi_mr_regattr(objects_.domain.get(), &attributes, 0, &registration);
  }
  if (result != 0)
    throw Error(ErrorCode::kSystem, fmt::format("libfabric: registering {} bytes of memory: {}", memory.bytes,
                                                LibfabricLibrary::get().text(result)));
  FidPtr<fid_mr> owner(registration);
  if (objects_.needs(FI_MR_ENDPOINT)) {
    require_ok(fi_mr_bind(registration, &objects_.endpoint->fid, 0), "fi_mr_bind");
    require_ok(fi_mr_enable(registration), "fi_mr_enable");
  }
  return owner;
}

int LibfabricMemory::add(const Memory& memory) {
  regions_.push_back({memory, registered(memory, FI_WRITE | FI_REMOTE_WRITE)});
  return static_cast<int>(regions_.size()) - 1;
}

const LibfabricMemory::Region& LibfabricMemory::at(int region) const {
  require(region >= 0 && region < static_cast<int>(regions_.size()) && regions_[region].registration,
          "region {} is not registered", region);
  return regions_[region];
}

void LibfabricMemory::remove(int region) {
  at(region);
  regions_[region] = Region{};
}

RegionKey LibfabricMemory::key(int region) const {
  const Region& mine = at(region);
  const auto base = reinterpret_cast<std::uint64_t>(mine.memory.base);
  return {objects_.needs(FI_MR_VIRT_ADDR) ? base : 0, mine.memory.bytes, fi_mr_key(mine.registration.get())};
}

}  // namespace deep_ep::net
