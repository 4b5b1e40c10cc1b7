#!/usr/bin/env bash
# Installs into a scratch prefix and builds the examples there as a stranger would: by pkg-config,
# shared and static, and by CMake from a moved tree (where cmake is installed).
set -euo pipefail
cd "$(dirname "$0")/../.."

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
CC=${CC:-cc}
CXX=${CXX:-c++}
WARN=(-Wall -Wextra -Wpedantic -Werror)
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
unset LIBDIR INCLUDEDIR BINDIR DESTDIR LD_LIBRARY_PATH

main() {
  command -v pkg-config >/dev/null || fail "pkg-config is missing: apt-get install pkg-config"
  local prefix="$SCRATCH/prefix"
  PREFIX=$prefix packaging/install.sh install
  check_files "$prefix"
  check_soname "$prefix/lib"
  check_pkg_config "$prefix"
  mv "$prefix" "$SCRATCH/moved"
  check_cmake "$SCRATCH/moved"
  check_staging
  echo "install: ok"
}

fail() {
  echo "install_test: $*" >&2
  exit 1
}

check_files() {
  local name
  for name in include/blockem.h include/blockem.hpp include/blockem/dlpack.h lib/libblockem.a \
    lib/libblockem.so lib/pkgconfig/blockem.pc lib/cmake/blockem/blockem-config.cmake \
    lib/cmake/blockem/blockem-config-version.cmake bin/blockem; do
    [ -s "$1/$name" ] || fail "$name was not installed"
  done
  "$1/bin/blockem" --version | grep -qF "$VERSION" || fail "blockem --version lacks $VERSION"
  ! grep -rlE '@[A-Z_]+@' "$1/lib/pkgconfig" "$1/lib/cmake" || fail "a template was not filled"
}

check_soname() {
  local soname
  soname=$(readelf -d "$1/libblockem.so" | sed -n 's/.*SONAME.*\[\(.*\)\]/\1/p')
  case $VERSION in
    0.*) [ "$soname" = "libblockem.so.$(cut -d. -f1-2 <<<"$VERSION")" ] ;;
    *) [ "$soname" = "libblockem.so.${VERSION%%.*}" ] ;;
  esac || fail "SONAME is '$soname'"
  [ "$(readlink -f "$1/$soname")" = "$(readlink -f "$1/libblockem.so.$VERSION")" ] ||
    fail "$soname leads elsewhere"
  ! nm -D --defined-only "$1/libblockem.so" | grep -v ' blockem_' ||
    fail "the library exports foreign symbols"
}

check_pkg_config() {
  local -x PKG_CONFIG_PATH="$1/lib/pkgconfig"
  local cflags libs static
  [ "$(pkg-config --modversion blockem)" = "$VERSION" ] || fail "blockem.pc has another version"
  read -ra cflags <<<"$(pkg-config --cflags blockem)"
  read -ra libs <<<"$(pkg-config --libs blockem)"
  read -ra static <<<"$(pkg-config --static --libs blockem)"
  static=("${static[@]/#-lblockem/-l:libblockem.a}")

  $CC -std=c99 "${WARN[@]}" "${cflags[@]}" examples/c/penalty.c -o "$SCRATCH/c" "${libs[@]}"
  LD_LIBRARY_PATH="$1/lib" "$SCRATCH/c" >/dev/null
  readelf -d "$SCRATCH/c" | grep -q 'NEEDED.*libblockem\.so\.[0-9]' ||
    fail "the program does not need the versioned library"
  $CXX -std=c++17 "${WARN[@]}" "${cflags[@]}" examples/cpp/penalty.cpp -o "$SCRATCH/cpp" "${libs[@]}"
  LD_LIBRARY_PATH="$1/lib" "$SCRATCH/cpp" >/dev/null

  $CC -std=c99 "${WARN[@]}" "${cflags[@]}" examples/c/penalty.c -o "$SCRATCH/static" "${static[@]}"
  "$SCRATCH/static" >/dev/null
  ! readelf -d "$SCRATCH/static" | grep -q libblockem || fail "the static program is not static"
}

check_cmake() {
  if ! command -v cmake >/dev/null; then
    echo "install_test: cmake is not installed; its package was not tried" >&2
    return
  fi
  mkdir "$SCRATCH/project"
  cat >"$SCRATCH/project/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.10)
project(user C CXX)
find_package(blockem ${VERSION%.*} REQUIRED)
set(CMAKE_C_STANDARD 99)
set(CMAKE_CXX_STANDARD 17)
add_executable(shared_c "$PWD/examples/c/penalty.c")
target_link_libraries(shared_c PRIVATE blockem::shared)
add_executable(static_c "$PWD/examples/c/penalty.c")
target_link_libraries(static_c PRIVATE blockem::static)
add_executable(shared_cpp "$PWD/examples/cpp/penalty.cpp")
target_link_libraries(shared_cpp PRIVATE blockem::shared)
CMAKE
  (
    cd "$SCRATCH/project"
    cmake -S . -B build -DCMAKE_PREFIX_PATH="$1" >log 2>&1 && cmake --build build >>log 2>&1
  ) || { cat "$SCRATCH/project/log" >&2; fail "the CMake project does not build"; }
  local name
  for name in shared_c static_c shared_cpp; do "$SCRATCH/project/build/$name" >/dev/null; done
  sed -i "s/find_package(blockem .* REQUIRED/find_package(blockem 99.0 REQUIRED/" \
    "$SCRATCH/project/CMakeLists.txt"
  ! cmake -S "$SCRATCH/project" -B "$SCRATCH/other" -DCMAKE_PREFIX_PATH="$1" >/dev/null 2>&1 ||
    fail "CMake accepts version 99"
}

# A packager's DESTDIR is in front of every path and in none of the files; uninstall leaves nothing.
check_staging() {
  local stage="$SCRATCH/stage"
  DESTDIR=$stage PREFIX=/usr LIBDIR=/usr/lib/somewhere packaging/install.sh install >/dev/null
  grep -qx 'prefix=/usr' "$stage/usr/lib/somewhere/pkgconfig/blockem.pc" || fail "wrong prefix"
  # shellcheck disable=SC2016
  grep -qxF 'libdir=${prefix}/lib/somewhere' "$stage/usr/lib/somewhere/pkgconfig/blockem.pc" ||
    fail "wrong libdir"
  ! grep -rIl "$stage" "$stage" || fail "a file names the staging folder"
  DESTDIR=$stage PREFIX=/usr LIBDIR=/usr/lib/somewhere packaging/install.sh uninstall
  [ -z "$(find "$stage" ! -type d)" ] || fail "uninstall leaves $(find "$stage" ! -type d)"
}

main
