//! Compiles the C++ half of the bridge and tells the tests where its headers are.

fn main() {
    cxx_build::bridge("src/lib.rs").std("c++17").compile("blockem-cxx-bridge");
    println!("cargo:rerun-if-changed=src/lib.rs");
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    println!("cargo:rustc-env=BLOCKEM_CXX_INCLUDE={out}/cxxbridge/include");
}
