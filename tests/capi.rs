//! The C ABI from outside: programs in C and C++ that include the public headers and link the
//! built library, plain, under AddressSanitizer and under valgrind; its symbols; its layout.
//!
//! The programs are in tests/capi, one for each subject; each has its own test here. `cargo test
//! --test capi` builds the shared and the static library first, with the profile of the tests.

#![cfg(all(target_os = "linux", target_pointer_width = "64"))]

#[path = "capi/cuda.rs"]
mod cuda;
#[path = "capi/header.rs"]
mod header;
#[path = "support/stub_cuda.rs"]
mod stub_cuda;
#[path = "capi/toolbox.rs"]
mod toolbox;
#[path = "capi/xla.rs"]
mod xla;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use header::Header;
use toolbox::{Link, Program, library_dir, need_tool, root, run, scratch};

// ---- Programs ----------------------------------------------------------------------------------

#[test]
fn vectors_in_c() {
    check_program("tests/capi/vectors.c", "c99");
}

#[test]
fn vectors_in_cpp() {
    check_program("tests/capi/vectors.cc", "c++17");
}

#[test]
fn statuses_and_messages() {
    check_program("tests/capi/statuses.c", "c99");
}

#[test]
fn null_pointers() {
    check_program("tests/capi/nulls.c", "c99");
}

#[test]
fn struct_sizes() {
    check_program("tests/capi/structs.c", "c99");
}

#[test]
fn memory_of_the_caller() {
    check_program("tests/capi/memory.c", "c99");
}

#[test]
fn threads() {
    check_program("tests/capi/threads.c", "c99");
}

#[test]
fn fork() {
    check_program("tests/capi/fork.c", "c99");
}

#[test]
fn reference_cache() {
    check_program("tests/capi/cache.c", "c99");
}

#[test]
#[cfg(feature = "tokenizers")]
fn text_masks() {
    check_program("tests/capi/mask.c", "c99");
}

#[test]
fn dlpack() {
    check_program("tests/capi/dlpack.c", "c99");
}

#[test]
fn cpp_wrapper() {
    check_program("tests/capi/hpp.cc", "c++11");
    for dialect in ["c++17", "c++20"] {
        let folder = scratch(&format!("hpp-{dialect}"));
        let program = plain(&["tests/capi/hpp.cc"], dialect).compile(&folder);
        run(Command::new(program).arg(&folder));
    }
}

#[test]
fn example_in_c() {
    check_program("examples/c/penalty.c", "c99");
}

#[test]
fn example_in_cpp() {
    check_program("examples/cpp/penalty.cpp", "c++17");
}

/// The examples take a checkpoint from the command line, too.
#[test]
fn examples_open_a_checkpoint() {
    let folder = scratch("examples-open");
    let (sae, set) = (folder.join("sae.safetensors"), folder.join("K0.json"));
    std::fs::write(&sae, tiny_checkpoint()).unwrap();
    std::fs::write(&set, r#"{"K_pos": [1, 2], "K_neg": [5]}"#).unwrap();
    for (source, dialect) in
        [("examples/c/penalty.c", "c99"), ("examples/cpp/penalty.cpp", "c++17")]
    {
        let program = plain(&[source], dialect).compile(&folder);
        for arguments in [vec![&sae], vec![&sae, &set]] {
            let output = run(Command::new(&program).args(&arguments));
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(text.contains("d 4, K"), "{source} read another SAE:\n{text}");
        }
        let wrong = Command::new(&program).arg(folder.join("missing")).output().unwrap();
        assert_eq!(wrong.status.code(), Some(1), "{source} on a missing file");
        let text = String::from_utf8_lossy(&wrong.stderr);
        assert!(text.contains("missing"), "{source} does not name the file: {text}");
    }
}

#[test]
fn static_library() {
    let folder = scratch("static");
    let program = Program { link: Link::Static, ..plain(&["examples/c/penalty.c"], "c99") };
    let program = program.compile(&folder);
    run(&mut Command::new(&program));
    let needed = needed_libraries(&program);
    assert!(!needed.iter().any(|name| name.contains("blockem")), "not static: {needed:?}");
}

/// Runs a program plain, under AddressSanitizer and UBSan, and under valgrind.
fn check_program(source: &str, dialect: &str) {
    need_tool("valgrind", "valgrind");
    let name = source.rsplit('/').next().unwrap();
    let folder = scratch(name);
    let inputs = |kind| {
        let dir = folder.join(kind);
        std::fs::create_dir_all(&dir).unwrap();
        // The examples open what they are given.
        if source.starts_with("examples") { None } else { Some(dir) }
    };
    let program = plain(&[source], dialect).compile(&folder);
    run(Command::new(&program).args(inputs("plain")));

    let sanitized = Program { sanitize: true, ..plain(&[source], dialect) }.compile(&folder);
    let mut command = Command::new(&sanitized);
    command.env("ASAN_OPTIONS", "detect_leaks=1:strict_string_checks=1");
    command.env("UBSAN_OPTIONS", "print_stacktrace=1");
    run(command.args(inputs("asan")));

    let mut valgrind = Command::new("valgrind");
    valgrind.args(["-q", "--error-exitcode=99", "--show-leak-kinds=definite"]);
    valgrind.arg("--errors-for-leak-kinds=definite");
    // A child of fork has lost the pool's threads, and with them what they held; it leaves the
    // parent's cache alone, too.
    valgrind.arg(if matches!(name, "fork.c" | "cache.c") {
        "--leak-check=no"
    } else {
        "--leak-check=full"
    });
    // Threads take turns there: fewer rounds.
    let rounds = (name == "threads.c").then_some("2");
    run(valgrind.arg(&program).args(inputs("valgrind")).args(rounds));
}

fn plain<'a>(sources: &'a [&'a str], dialect: &'a str) -> Program<'a> {
    Program { sources, dialect, sanitize: false, link: Link::Shared, headers: None }
}

/// A bare safetensors file that states its recipe: d = 4, F = 6.
fn tiny_checkpoint() -> Vec<u8> {
    let header = concat!(
        r#"{"__metadata__":{"architecture":"standard","apply_b_dec_to_input":"False","#,
        r#""normalize_activations":"none"},"#,
        r#""W_enc":{"dtype":"F32","shape":[4,6],"data_offsets":[0,96]},"#,
        r#""b_enc":{"dtype":"F32","shape":[6],"data_offsets":[96,120]}}"#
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    for i in 0..30u8 {
        file.extend((f32::from(i * 7 % 11) * 0.1 - 0.5).to_le_bytes());
    }
    file
}

// ---- Headers -----------------------------------------------------------------------------------

#[test]
fn headers_in_every_dialect() {
    let sources = ["tests/capi/headers_a.c", "tests/capi/headers_b.c"];
    for dialect in ["c99", "c11", "c++11", "c++17", "c++20"] {
        let program = plain(&sources, dialect).compile(&scratch(&format!("headers-{dialect}")));
        run(&mut Command::new(program));
    }
}

fn public_header() -> Header {
    let text = std::fs::read_to_string(root().join("include/blockem.h")).unwrap();
    let header = Header::parse(&text);
    // A header that this parser cannot read must not pass as an empty one.
    assert!(header.functions.len() > 20 && header.structs.len() > 10, "cannot read blockem.h");
    header
}

/// Every status of the header has a name, and a test provokes every one that callers or data can.
#[test]
fn every_status_is_reached() {
    let folder = scratch("reached");
    let program = plain(&["tests/capi/statuses.c"], "c99").compile(&folder);
    let output = run(Command::new(program).arg(&folder));
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    for case in ["failures", "forked", "capture"] {
        text += &cuda::check_case(case, &[]);
    }
    text += &cuda::check_case("no-device", &[("STUB_CUDA_DEVICES", "0")]);
    let numbers = |word: &str| -> BTreeSet<i64> {
        let lines = text.lines().filter_map(|line| line.strip_prefix(word));
        lines.filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
    };
    let statuses: BTreeSet<i64> = public_header().statuses().into_iter().collect();
    assert_eq!(numbers("named "), statuses, "tests/capi/statuses.c must name each status");
    let provokable = |status: &i64| (100..=306).contains(status);
    let missing: Vec<&i64> =
        statuses.iter().filter(|s| provokable(s) && !numbers("reached ").contains(s)).collect();
    assert!(missing.is_empty(), "neither statuses.c nor cuda.c in tests/capi reaches {missing:?}");
}

// ---- The binary --------------------------------------------------------------------------------

#[test]
fn only_the_headers_functions_leave_the_library() {
    let library = library_dir().join("libblockem.so");
    let output = run(Command::new("nm").args(["-D", "--defined-only", "-P"]).arg(&library));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let exported: BTreeSet<&str> =
        text.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let header = public_header();
    let declared: BTreeSet<&str> = header.functions.iter().map(|f| f.name.as_str()).collect();
    let testing = cfg!(feature = "test-isa").then_some("blockem_test_use_isa");
    let foreign: Vec<_> =
        exported.difference(&declared).filter(|name| Some(**name) != testing).collect();
    let missing: Vec<_> = declared.difference(&exported).collect();
    assert!(foreign.is_empty(), "{} exports what the header lacks: {foreign:?}", library.display());
    assert!(missing.is_empty(), "{} lacks functions of the header: {missing:?}", library.display());
    println!("{}: {} bytes", library.display(), library.metadata().unwrap().len());
}

#[test]
fn only_system_libraries_are_needed() {
    // The last three were libraries of their own before glibc 2.34.
    let allowed = ["libc.", "libm.", "libgcc_s.", "ld-linux", "libpthread.", "libdl.", "librt."];
    for name in needed_libraries(&library_dir().join("libblockem.so")) {
        assert!(allowed.iter().any(|a| name.starts_with(a)), "libblockem.so needs {name}");
    }
}

fn needed_libraries(binary: &Path) -> Vec<String> {
    let output = run(Command::new("readelf").arg("-d").arg(binary));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = text.lines().filter(|line| line.contains("(NEEDED)"));
    let names = lines.filter_map(|line| line.split_once('[')?.1.split_once(']'));
    names.map(|(name, _)| name.to_owned()).collect()
}

/// Sizes, offsets, numbers and prototypes as they were when they were last agreed to. Growth adds
/// lines; ABI.md says what may never change. BLOCKEM_WRITE_ABI=1 records the present state.
#[test]
fn layout_is_the_recorded_one() {
    let path = root().join("tests/capi/abi.txt");
    let now = layout();
    if std::env::var_os("BLOCKEM_WRITE_ABI").is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let recorded = std::fs::read_to_string(&path).unwrap_or_default();
    let lines = |text: &str| -> Vec<String> { text.lines().map(str::to_owned).collect() };
    let (old, new) = (lines(&recorded), lines(&now));
    let gone: Vec<_> =
        old.iter().filter(|l| !new.contains(l)).map(|l| format!("- {l}\n")).collect();
    let come: Vec<_> =
        new.iter().filter(|l| !old.contains(l)).map(|l| format!("+ {l}\n")).collect();
    assert!(
        recorded == now,
        "the C ABI is not the one in tests/capi/abi.txt. If this is growth by ABI.md's rules, \
         record it with BLOCKEM_WRITE_ABI=1 cargo test --test capi layout\n{}{}",
        gone.concat(),
        come.concat()
    );
}

/// The header's layout, as the C compiler lays it out.
fn layout() -> String {
    let header = public_header();
    let mut program = String::from("#include <blockem.h>\n#include <stdio.h>\nint main(void) {\n");
    let mut print = |text: String, values: &[String]| {
        let values: String = values.iter().map(|value| format!(", {value}")).collect();
        program += &format!("  printf(\"{text}\\n\"{values});\n");
    };
    for (name, _) in &header.constants {
        print(format!("constant {name} %lld"), &[format!("(long long){name}")]);
    }
    for s in &header.structs {
        print(format!("struct {} %zu", s.name), &[format!("sizeof({})", s.name)]);
        for f in &s.fields {
            let size = format!("sizeof((({} *)0)->{})", s.name, f.name);
            let text = format!("  {}.{} at %zu, %zu bytes, {}", s.name, f.name, f.kind);
            print(text, &[format!("offsetof({}, {})", s.name, f.name), size]);
        }
    }
    for f in &header.functions {
        print(format!("function {}", f.prototype), &[]);
    }
    program += "  return 0;\n}\n";
    let folder = scratch("layout");
    let source = folder.join("layout.c");
    std::fs::write(&source, program).unwrap();
    let source = source.to_str().expect("a scratch folder in UTF-8");
    let exe = plain(&[source], "c99").compile(&folder);
    String::from_utf8(run(&mut Command::new(exe)).stdout).unwrap()
}
