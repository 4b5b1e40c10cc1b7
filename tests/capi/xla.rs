//! The XLA handlers without JAX: tests/capi/xla.c, compiled with XLA's own header as the oldest
//! supported jaxlib and the newest have it.

use std::path::PathBuf;

use crate::cuda::check_on_stub;
use crate::toolbox::{Link, Program, root};

#[test]
fn handlers_on_the_cpu() {
    check("cpu");
}

#[test]
fn handlers_on_cuda() {
    check("cuda");
}

fn check(case: &str) {
    for (jaxlib, headers) in jaxlibs() {
        let program = |sanitize| Program {
            sources: &["tests/capi/xla.c"],
            dialect: "gnu11",
            sanitize,
            link: Link::Shared,
            headers: Some(&headers),
        };
        check_on_stub(&format!("xla-{case}-{jaxlib}"), program, case, &[]);
    }
}

/// The headers that `make test` installs.
fn jaxlibs() -> [(&'static str, PathBuf); 2] {
    let venv = root().join(".venv");
    let libraries = std::fs::read_dir(venv.join("lib")).into_iter().flatten().flatten();
    let mut packages = libraries.map(|python| python.path().join("site-packages"));
    let newest = packages.find(|folder| folder.join("jaxlib").is_dir()).unwrap_or(venv.clone());
    [("oldest", venv.join("jax-oldest")), ("newest", newest)].map(|(name, folder)| {
        let headers = folder.join("jaxlib/include");
        assert!(
            headers.join("xla/ffi/api/c_api.h").is_file(),
            "{} has no xla/ffi/api/c_api.h: `make test` installs both jaxlibs",
            headers.display()
        );
        (name, headers)
    })
}
