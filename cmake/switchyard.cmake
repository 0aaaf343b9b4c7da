# Flags and the two functions with which every room declares its library and its tests.
add_library(switchyard_flags INTERFACE)
target_include_directories(switchyard_flags INTERFACE ${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR}/gen)
target_compile_options(switchyard_flags INTERFACE
  -Wall -Wextra -Werror
  # Equal bits: the compiler never fuses a*b+c by itself; kernels say so with intrinsics.
  -ffp-contract=off)
target_compile_definitions(switchyard_flags INTERFACE SWITCHYARD_VERSION="${PROJECT_VERSION}")
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  target_compile_options(switchyard_flags INTERFACE -Wthread-safety)
endif()
if(SWITCHYARD_SANITIZE)
  target_compile_options(switchyard_flags INTERFACE -fsanitize=${SWITCHYARD_SANITIZE} -fno-omit-frame-pointer -g1)
  target_link_options(switchyard_flags INTERFACE -fsanitize=${SWITCHYARD_SANITIZE})
  if(SWITCHYARD_SANITIZE STREQUAL "thread")
    # GCC warns that it cannot see fences under TSan; ours are only in the libraries we use.
    target_compile_options(switchyard_flags INTERFACE $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
  endif()
endif()

# switchyard_library(NAME n SRCS a.cc … LIBS x …): a room's static library.
function(switchyard_library)
  cmake_parse_arguments(A "" "NAME" "SRCS;LIBS" ${ARGN})
  add_library(${A_NAME} STATIC ${A_SRCS})
  target_link_libraries(${A_NAME} PUBLIC switchyard_flags ${A_LIBS})
endfunction()

# switchyard_test(NAME n SRCS a_test.cc LIBS x … [LABELS fast|full] [TIMEOUT s]): one GoogleTest binary = one ctest.
function(switchyard_test)
  if(NOT SWITCHYARD_TESTS)
    return()
  endif()
  cmake_parse_arguments(A "" "NAME;TIMEOUT" "SRCS;LIBS;LABELS" ${ARGN})
  if(NOT A_LABELS)
    set(A_LABELS fast)
  endif()
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 300)
  endif()
  if(SWITCHYARD_SANITIZE)
    math(EXPR A_TIMEOUT "4 * ${A_TIMEOUT}")
  endif()
  add_executable(${A_NAME} ${A_SRCS})
  target_link_libraries(${A_NAME} PRIVATE switchyard_flags ${A_LIBS} GTest::gmock_main)
  target_compile_definitions(${A_NAME} PRIVATE SWITCHYARD_SOURCE_DIR="${CMAKE_SOURCE_DIR}")
  add_test(NAME ${A_NAME} COMMAND ${A_NAME})
  set_tests_properties(${A_NAME} PROPERTIES LABELS "${A_LABELS}" TIMEOUT ${A_TIMEOUT})
endfunction()

# switchyard_fuzz(NAME n SRCS a_fuzz.cc LIBS x …): a libFuzzer target, built by the fuzz preset only.
function(switchyard_fuzz)
  cmake_parse_arguments(A "" "NAME" "SRCS;LIBS" ${ARGN})
  if(SWITCHYARD_FUZZ)
    add_executable(${A_NAME} ${A_SRCS})
    target_link_libraries(${A_NAME} PRIVATE switchyard_flags ${A_LIBS})
    target_compile_options(${A_NAME} PRIVATE -fsanitize=fuzzer)
    target_link_options(${A_NAME} PRIVATE -fsanitize=fuzzer)
    set_property(GLOBAL APPEND PROPERTY SWITCHYARD_FUZZERS ${A_NAME})
  endif()
endfunction()

# switchyard_protobuf_sources(a.cc …): sources of the calling folder that include generated messages. Under TSan
# protobuf's headers give maps two more members, which the distribution's library does not know.
function(switchyard_protobuf_sources)
  if(SWITCHYARD_SANITIZE STREQUAL "thread")
    set_source_files_properties(${ARGN} PROPERTIES COMPILE_OPTIONS -U__SANITIZE_THREAD__ SKIP_PRECOMPILE_HEADERS ON)
  endif()
endfunction()
