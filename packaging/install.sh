#!/usr/bin/env bash
# Builds and installs libblockem; `make install` and `make uninstall` call it.
#
#   PREFIX/include/blockem.h blockem.hpp blockem/dlpack.h
#   PREFIX/lib/libblockem.so.VERSION, links libblockem.so.SOVERSION and libblockem.so
#   PREFIX/lib/libblockem.a
#   PREFIX/lib/pkgconfig/blockem.pc
#   PREFIX/lib/cmake/blockem/blockem-config.cmake, -version.cmake
#   PREFIX/bin/blockem
#
# Environment: PREFIX (/usr/local), LIBDIR, INCLUDEDIR, BINDIR (below PREFIX), DESTDIR (a staging
# folder before all of them), CARGO, CARGO_TARGET_DIR. The installed library is built apart from
# target/release, where the plain one has no SONAME.
set -euo pipefail
cd "$(dirname "$0")/.."

PREFIX=${PREFIX:-/usr/local}
LIBDIR=${LIBDIR:-$PREFIX/lib}
INCLUDEDIR=${INCLUDEDIR:-$PREFIX/include}
BINDIR=${BINDIR:-$PREFIX/bin}
DESTDIR=${DESTDIR:-}
CARGO=${CARGO:-cargo}
TARGET=${CARGO_TARGET_DIR:-target}

VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
IFS=. read -r MAJOR MINOR _ <<<"$VERSION"
# Before 1.0 a minor version may change the ABI (ABI.md).
if [ "$MAJOR" = 0 ]; then SOVERSION=0.$MINOR; else SOVERSION=$MAJOR; fi
SONAME=libblockem.so.$SOVERSION

CMAKEDIR=$LIBDIR/cmake/blockem
PCDIR=$LIBDIR/pkgconfig

main() {
  for dir in "$PREFIX" "$LIBDIR" "$INCLUDEDIR" "$BINDIR"; do
    [[ $dir == /* ]] || { echo "install: $dir is not an absolute path" >&2; exit 2; }
  done
  case ${1:-} in
    install) build && install_all ;;
    uninstall) uninstall_all ;;
    *) echo "usage: packaging/install.sh install|uninstall" >&2; exit 2 ;;
  esac
}

build() {
  $CARGO rustc --release --locked --lib --no-default-features --features tokenizers \
    --crate-type cdylib,staticlib --target-dir "$TARGET/install" -- -C "link-arg=-Wl,-soname,$SONAME"
  $CARGO build --release --locked --bin blockem
}

install_all() {
  local built=$TARGET/install/release
  put 644 include/blockem.h include/blockem.hpp "$INCLUDEDIR"
  put 644 include/blockem/dlpack.h "$INCLUDEDIR/blockem"
  put 644 "$built/libblockem.a" "$LIBDIR"
  put 755 "$TARGET/release/blockem" "$BINDIR"
  install -m 755 "$built/libblockem.so" "$DESTDIR$LIBDIR/libblockem.so.$VERSION"
  ln -sf "libblockem.so.$VERSION" "$DESTDIR$LIBDIR/$SONAME"
  ln -sf "$SONAME" "$DESTDIR$LIBDIR/libblockem.so"

  local native
  native=$(native_static_libs)
  fill packaging/blockem.pc.in "$PCDIR/blockem.pc" "$native"
  fill bindings/cmake/blockem-config.cmake.in "$CMAKEDIR/blockem-config.cmake" "$native"
  fill bindings/cmake/blockem-config-version.cmake.in "$CMAKEDIR/blockem-config-version.cmake" ""
  echo "installed libblockem $VERSION in $DESTDIR$PREFIX"
}

uninstall_all() {
  rm -f "$DESTDIR$INCLUDEDIR"/blockem.{h,hpp} "$DESTDIR$INCLUDEDIR/blockem/dlpack.h" \
    "$DESTDIR$LIBDIR"/libblockem.{a,so} "$DESTDIR$LIBDIR/$SONAME" \
    "$DESTDIR$LIBDIR/libblockem.so.$VERSION" "$DESTDIR$PCDIR/blockem.pc" \
    "$DESTDIR$CMAKEDIR"/blockem-config{,-version}.cmake "$DESTDIR$BINDIR/blockem"
  rmdir --ignore-fail-on-non-empty "$DESTDIR$CMAKEDIR" "$DESTDIR$INCLUDEDIR/blockem" 2>/dev/null || true
}

# put MODE FILE... FOLDER
put() {
  local mode=$1 folder=${*: -1}
  install -d "$DESTDIR$folder"
  install -m "$mode" "${@:2:$#-2}" "$DESTDIR$folder"
}

# fill TEMPLATE FILE NATIVE_LIBS
fill() {
  install -d "$DESTDIR$(dirname "$2")"
  sed -e "s|@VERSION@|$VERSION|g" -e "s|@SONAME@|$SONAME|g" -e "s|@PREFIX@|$PREFIX|g" \
    -e "s|@PC_LIBDIR@|$(below_prefix "$LIBDIR")|g" \
    -e "s|@PC_INCLUDEDIR@|$(below_prefix "$INCLUDEDIR")|g" \
    -e "s|@INCLUDE_FROM_LIB@|$(realpath -m --relative-to="$LIBDIR" "$INCLUDEDIR")|g" \
    -e "s|@NATIVE_LIBS@|$3|g" -e "s|@NATIVE_LIBS_LIST@|${3// /;}|g" "$1" >"$DESTDIR$2"
  chmod 644 "$DESTDIR$2"
}

# pkg-config can move a prefix that all its paths are written from.
below_prefix() {
  if [[ $1 == "$PREFIX"/* ]]; then echo "\${prefix}${1#"$PREFIX"}"; else echo "$1"; fi
}

# What a static Rust library needs from the system, as rustc itself says.
native_static_libs() {
  local dir
  dir=$(mktemp -d)
  : >"$dir/empty.rs"
  "${RUSTC:-rustc}" --crate-type staticlib --print native-static-libs --out-dir "$dir" \
    "$dir/empty.rs" 2>&1 | sed -n 's/^note: native-static-libs: //p'
  rm -r "$dir"
}

main "$@"
