# The CUDA toolkit and NCCL, which come from NVIDIA's packages; SWITCHYARD_CUDA_DEVICES = devices of this machine.
find_package(CUDAToolkit QUIET)
if(NOT CUDAToolkit_FOUND)
  message(FATAL_ERROR "SWITCHYARD_CUDA=ON: no CUDA toolkit (nvcc) found. Install cuda-toolkit from NVIDIA's apt "
    "repository, or set CUDAToolkit_ROOT.")
endif()
find_path(NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
find_library(NCCL_LIBRARY nccl HINTS ${CUDAToolkit_LIBRARY_DIR})
if(NOT NCCL_INCLUDE_DIR OR NOT NCCL_LIBRARY)
  message(FATAL_ERROR "SWITCHYARD_CUDA=ON: NCCL not found (nccl.h: ${NCCL_INCLUDE_DIR}, library: ${NCCL_LIBRARY}). "
    "Install libnccl-dev and libnccl2 from NVIDIA's apt repository, or set NCCL_INCLUDE_DIR and NCCL_LIBRARY.")
endif()
add_library(NCCL::nccl UNKNOWN IMPORTED)
set_target_properties(NCCL::nccl PROPERTIES IMPORTED_LOCATION ${NCCL_LIBRARY}
  INTERFACE_INCLUDE_DIRECTORIES ${NCCL_INCLUDE_DIR})
target_link_libraries(NCCL::nccl INTERFACE CUDA::cudart)

set(SWITCHYARD_CUDA_DEVICES 0)
find_program(NVIDIA_SMI nvidia-smi)
if(NVIDIA_SMI)
  execute_process(COMMAND ${NVIDIA_SMI} -L OUTPUT_VARIABLE DEVICES ERROR_QUIET)
  string(REGEX MATCHALL "GPU [0-9]+:" DEVICES "${DEVICES}")
  list(LENGTH DEVICES SWITCHYARD_CUDA_DEVICES)
endif()
