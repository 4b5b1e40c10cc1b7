//! Compiles the C++ half of the bridge and tells the tests where its headers are. Where
//! BLOCKEM_CXX_HEADERS names a folder, copies of them are put there: build systems that call cargo
//! cannot know the folder that cargo chooses.

use std::path::{Path, PathBuf};

const HEADERS: [&str; 2] = ["blockem-cxx/src/lib.rs.h", "rust/cxx.h"];

fn main() {
    cxx_build::bridge("src/lib.rs").std("c++17").compile("blockem-cxx-bridge");
    println!("cargo:rerun-if-changed=src/lib.rs");
    println!("cargo:rerun-if-env-changed=BLOCKEM_CXX_HEADERS");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    let made = Path::new(&out).join("cxxbridge/include");
    println!("cargo:rustc-env=BLOCKEM_CXX_INCLUDE={}", made.display());
    if let Some(folder) = std::env::var_os("BLOCKEM_CXX_HEADERS").map(PathBuf::from) {
        for header in HEADERS {
            copy(&made.join(header), &folder.join(header));
        }
    }
}

/// Cargo comes back here when the copy is gone; one with these bytes keeps its time, so that nothing is
/// built again because of it.
fn copy(from: &Path, to: &Path) {
    println!("cargo:rerun-if-changed={}", to.display());
    let bytes = std::fs::read(from).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    if std::fs::read(to).is_ok_and(|there| there == bytes) {
        return;
    }
    std::fs::create_dir_all(to.parent().expect("a header lies in a folder"))
        .and_then(|()| std::fs::write(to, bytes))
        .unwrap_or_else(|e| panic!("{}: {e}", to.display()));
}
