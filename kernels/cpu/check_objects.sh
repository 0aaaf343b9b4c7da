#!/bin/sh
# check_objects.sh PATH OBJECT...: the objects of one instruction path hold the instructions that they should, none that
# they should not, and no function that the linker could share with other objects.
set -eu
path=$1
shift
has() { objdump -d --no-show-raw-insn "$@" | grep -q "$pattern"; }
fail() {
  echo "$path: $1" >&2
  exit 1
}
case $path in
  avx512)
    pattern=vdpbf16ps; has "$@" || fail "no bfloat16 dot products"
    pattern=vpdpbusd; has "$@" || fail "no byte dot products" ;;
  avx2)
    pattern=vfmadd; has "$@" || fail "no fused multiply-adds"
    pattern=%zmm; has "$@" && fail "AVX-512 instructions" ;;
  portable) pattern=%ymm; has "$@" && fail "AVX instructions" ;;
esac
shared=$(nm -C "$@" | grep -E ' [WVu] ' | grep -vE "cpu_$path|asan|tsan|DW.ref" || true)
[ -z "$shared" ] || fail "functions that other objects could share: $shared"
