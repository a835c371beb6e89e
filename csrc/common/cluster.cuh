// Thread-block clusters: blocks that run at the same time, wait for each other and write into each
// other's shared memory. GPUs from sm_90 on have them; on others no kernel that calls these is
// launched.
#pragma once

#include <cooperative_groups.h>

#include "common/device.cuh"

namespace rlhf::RLHF_ISA {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
RLHF_HD void cluster_sync() { __trap(); }
template <class T>
RLHF_HD void store_in_block(T*, unsigned, const T&) {
  __trap();
}
#else
// Called by all threads of a cluster. What they wrote before can be read by all of them behind it.
RLHF_HD void cluster_sync() {
  __syncwarp();  // lanes may come from different branches
  cooperative_groups::this_cluster().sync();
}

// x into the place of block `rank` of the cluster that is *place here. All blocks must have started
// (a cluster_sync), and none may end before the cluster_sync behind the last such store.
template <class T>
RLHF_HD void store_in_block(T* place, unsigned rank, const T& x) {
  *cooperative_groups::this_cluster().map_shared_rank(place, rank) = x;
}
#endif

// ------------------------------------------------------------------- host

// Whether clusters of this kernel run on the current device. Code that was compiled for an older
// architecture has none, whatever it runs on.
template <class Args>
bool can_cluster(void (*kernel)(Args), int device) {
  int major = 0;
  DeviceGuard::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                     "cudaDeviceGetAttribute");
  if (major < 9) return false;
  cudaFuncAttributes attributes;
  DeviceGuard::check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion >= 90;
}

// Clusters of `size` neighbouring blocks; `size` is at most 8 and divides `blocks`.
template <class Args>
void launch_clusters(void (*kernel)(Args), unsigned blocks, unsigned size, unsigned threads,
                     cudaStream_t stream, const Args& args, const std::string& what) {
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {size, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  DeviceGuard::check(cudaLaunchKernelEx(&config, kernel, args), what);
}

}  // namespace rlhf::RLHF_ISA
