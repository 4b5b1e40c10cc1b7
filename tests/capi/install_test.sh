#!/usr/bin/env bash
# Installs into a scratch prefix and builds the examples there as a stranger would: by pkg-config,
# shared and static, and by CMake from a moved tree.
#
#   install_test.sh            what `make install` lays out
#   install_test.sh cargo-c    what packagers get from `cargo cinstall`
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
  local tool
  for tool in pkg-config cmake; do
    command -v "$tool" >/dev/null || fail "$tool is missing: make test-install installs it"
  done
  local prefix="$SCRATCH/prefix"
  if [ "${1:-}" = cargo-c ]; then
    check_cargo_c "$prefix"
    echo "cargo-c: ok"
    return
  fi
  PREFIX=$prefix packaging/install.sh install
  check_files "$prefix"
  check_soname "$prefix/lib"
  check_pkg_config "$prefix"
  mv "$prefix" "$SCRATCH/moved"
  check_moved_pkg_config "$SCRATCH/moved"
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

# pkg-config can be told to start from the file's own place.
check_moved_pkg_config() {
  local flags
  flags=$(PKG_CONFIG_PATH="$1/lib/pkgconfig" pkg-config --define-prefix --cflags --libs blockem)
  [[ $flags == *"-I$1/include"*"-L$1/lib"* ]] || fail "pkg-config finds a moved tree at $flags"
}

# Its tree is that of `make install` without the command line and the CMake package.
check_cargo_c() {
  cargo cinstall --quiet --release --locked --no-default-features --features tokenizers --prefix "$1" --libdir "$1/lib" \
    --target-dir target/cargo-c
  local name
  for name in include/blockem.h include/blockem.hpp include/blockem/dlpack.h; do
    cmp "$name" "$1/$name" || fail "$name is another than the committed one"
  done
  check_soname "$1/lib"
  check_pkg_config "$1"
}

# A stranger's project, from shared and from static library; $1 is a prefix that was moved.
check_cmake() {
  write_project "$SCRATCH/project" "${VERSION%.*} REQUIRED COMPONENTS shared static"
  (
    cd "$SCRATCH/project"
    cmake -S . -B build -DCMAKE_PREFIX_PATH="$1" >log 2>&1 && cmake --build build >>log 2>&1
  ) || { cat "$SCRATCH/project/log" >&2; fail "the CMake project does not build"; }
  local name
  for name in shared_c static_c shared_cpp static_cpp; do
    "$SCRATCH/project/build/$name" >/dev/null || fail "$name of the CMake project fails"
  done
  readelf -d "$SCRATCH/project/build/shared_c" | grep -q 'NEEDED.*libblockem\.so\.[0-9]' ||
    fail "the CMake program does not need the versioned library"
  ! readelf -d "$SCRATCH/project/build/static_c" | grep -q libblockem ||
    fail "the static CMake program is not static"

  local patch=${VERSION##*.} minor
  minor=$(cut -d. -f2 <<<"$VERSION")
  local found
  for found in "" "$VERSION" "$VERSION EXACT" "${VERSION%.*}" "0.0...99" "$VERSION...<99" \
    "$VERSION...$VERSION" "${VERSION%.*} COMPONENTS static" "COMPONENTS shared"; do
    find_blockem "$1" "$found REQUIRED" || { cat "$SCRATCH/find/log" >&2; fail "CMake refuses '$found'"; }
  done
  local refused
  for refused in 99.0 "${VERSION%.*}.$((patch + 1))" "${VERSION%%.*}.$((minor + 1))" "99.0 EXACT" \
    "0.0...<$VERSION" "$VERSION.1...99" "COMPONENTS dynamic"; do
    ! find_blockem "$1" "$refused REQUIRED" || fail "CMake accepts '$refused'"
  done
  grep -q 'there is no component dynamic: shared, static' "$SCRATCH/find/log" ||
    fail "CMake does not say which components there are"
  case $VERSION in
    0.0.* | 0.1.*) ;; # There is no older minor version.
    0.*) ! find_blockem "$1" "0.$((minor - 1)) REQUIRED" || fail "CMake accepts an older minor version" ;;
  esac

  mv "$1/lib/libblockem.a" "$SCRATCH"
  find_blockem "$1" "COMPONENTS shared REQUIRED" || fail "shared needs the static library"
  ! find_blockem "$1" "COMPONENTS static REQUIRED" || fail "CMake finds a static library that is gone"
  grep -q 'libblockem.a is missing' "$SCRATCH/find/log" || fail "CMake does not name what is missing"
  mv "$SCRATCH/libblockem.a" "$1/lib"
  # As where /lib leads to /usr/lib: the headers lie beside the folder that the link leads to.
  mkdir "$SCRATCH/root"
  ln -s "$1/lib" "$SCRATCH/root/lib"
  find_blockem "$SCRATCH/root" REQUIRED || { cat "$SCRATCH/find/log" >&2; fail "CMake is lost behind a link"; }
}

# write_project FOLDER FIND_PACKAGE_ARGUMENTS
write_project() {
  mkdir "$1"
  cat >"$1/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.10)
project(user C CXX)
find_package(blockem $2)
set(CMAKE_C_STANDARD 99)
set(CMAKE_CXX_STANDARD 17)
foreach(link shared static)
  add_executable(\${link}_c "$PWD/examples/c/penalty.c")
  target_link_libraries(\${link}_c PRIVATE blockem::\${link})
  add_executable(\${link}_cpp "$PWD/examples/cpp/penalty.cpp")
  target_link_libraries(\${link}_cpp PRIVATE blockem::\${link})
endforeach()
CMAKE
}

# find_blockem PREFIX FIND_PACKAGE_ARGUMENTS: whether CMake finds the package there.
find_blockem() {
  rm -rf "$SCRATCH/find"
  mkdir "$SCRATCH/find"
  echo "cmake_minimum_required(VERSION 3.19)
project(user NONE)
set(CMAKE_SIZEOF_VOID_P 8)
find_package(blockem $2)" >"$SCRATCH/find/CMakeLists.txt"
  cmake -S "$SCRATCH/find" -B "$SCRATCH/find/build" -DCMAKE_PREFIX_PATH="$1" \
    >"$SCRATCH/find/log" 2>&1
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

main "$@"
