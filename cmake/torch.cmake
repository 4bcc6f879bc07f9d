# torch::headers and torch::torch from the Python package, without find_package(Torch): that one
# wants a CUDA toolkit as soon as the package was built with CUDA, and nothing of ours needs one.
# libtorch_cuda is loaded at run time when the user asks for a GPU (video/device.cpp), so that a
# CPU run does not map 3 GB of CUDA libraries.
set(SLA2_PYTHON "" CACHE FILEPATH "The Python whose torch package is used (default: .venv's, then python3)")
if(NOT SLA2_PYTHON)
  if(EXISTS ${CMAKE_SOURCE_DIR}/.venv/bin/python)
    set(SLA2_PYTHON ${CMAKE_SOURCE_DIR}/.venv/bin/python)
  else()
    set(SLA2_PYTHON python3)
  endif()
endif()
if(NOT SLA2_TORCH_DIR)
  execute_process(COMMAND ${SLA2_PYTHON} -E -c  # pip hides the torch package through PYTHONPATH
      "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE torch_dir OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_failed ERROR_QUIET)
  if(torch_failed)
    message(FATAL_ERROR "no torch package in ${SLA2_PYTHON}: run `make setup`, or configure with -DSLA2_TORCH=OFF")
  endif()
  set(SLA2_TORCH_DIR ${torch_dir} CACHE PATH "The torch package")
endif()

add_library(torch::headers INTERFACE IMPORTED)
target_include_directories(torch::headers SYSTEM INTERFACE
  ${SLA2_TORCH_DIR}/include ${SLA2_TORCH_DIR}/include/torch/csrc/api/include)
add_library(torch::torch INTERFACE IMPORTED)
target_link_libraries(torch::torch INTERFACE torch::headers
  ${SLA2_TORCH_DIR}/lib/libtorch_cpu.so ${SLA2_TORCH_DIR}/lib/libc10.so)
target_link_options(torch::torch INTERFACE -Wl,--allow-shlib-undefined)
set(CMAKE_BUILD_RPATH ${SLA2_TORCH_DIR}/lib)

# A unit that includes torch/torch.h takes 5 s to read the precompiled header and 5 more for the code
# of torch's own templates, whatever is in it. -DSLA2_UNITY=OFF: one file a unit, for who changes one
# file after the other.
option(SLA2_UNITY "Compile the sources that include torch in batches" ON)
function(sla2_compile_in_batches target size)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${SLA2_UNITY} UNITY_BUILD_BATCH_SIZE ${size})
endfunction()
