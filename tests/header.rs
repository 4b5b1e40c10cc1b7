//! include/blockem.h is what cbindgen makes of src/capi. `make header` rewrites it.

use std::path::Path;

#[test]
fn committed_header_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let sections = [
        "status",
        "version",
        "device",
        "tensor",
        "raw",
        "sae",
        "latents",
        "plan",
        "run",
        "cache",
        "xla",
        "stats",
        "steer",
        "mask",
        "tokenizer",
    ];
    let mut builder = cbindgen::Builder::new().with_config(config);
    for section in sections {
        builder = builder.with_src(root.join(format!("src/capi/{section}.rs")));
    }
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    let (text, path) = (String::from_utf8(text).unwrap(), root.join("include/blockem.h"));
    if std::env::var_os("BLOCKEM_WRITE_HEADER").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == text, "include/blockem.h is stale: run `make header` and commit it");
}
