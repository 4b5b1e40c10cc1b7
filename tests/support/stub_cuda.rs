//! A CUDA driver that keeps records instead of a device: tests/stub_cuda.

use std::path::Path;
use std::process::Command;

/// Builds the stub as `folder`/libcuda.so.1, which programs find through LD_LIBRARY_PATH.
pub fn build(folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stub_cuda/stub.c");
    let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    compiler.args(["-std=gnu11", "-g", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"]);
    compiler.args(["-Wall", "-Wextra", "-Wshadow", "-Werror", "-Wl,-soname,libcuda.so.1"]);
    compiler.arg("-o").arg(folder.join("libcuda.so.1")).arg(source).arg("-lpthread");
    let output = compiler.output().expect("run the C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
