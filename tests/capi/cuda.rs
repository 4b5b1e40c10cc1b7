//! The CUDA backend without a device: tests/capi/cuda.c on the stub driver of tests/stub_cuda.

use std::path::Path;
use std::process::Command;

use blockem::capi::version::{blockem_build_info, blockem_build_info_get};

use crate::stub_cuda;
use crate::toolbox::{Link, Program, library_dir, need_tool, root, run, scratch};

/// Fails with the remedy where this build has no kernels: a check that cannot run is not passed.
fn need_kernels() {
    // SAFETY: the struct is plain numbers.
    let mut info: blockem_build_info = unsafe { std::mem::zeroed() };
    info.struct_size = size_of::<blockem_build_info>();
    // SAFETY: sized just now.
    assert_eq!(unsafe { blockem_build_info_get(&mut info) }, 0);
    assert!(
        info.has_cuda == 1,
        "this build has no CUDA kernels; `make test` installs nvcc, or: pip install -r \
         requirements.txt into .venv, and touch build.rs"
    );
}

fn program(sanitize: bool) -> Program<'static> {
    let sources = &["tests/capi/cuda.c"];
    Program { sources, dialect: "gnu11", sanitize, link: Link::Shared, headers: None }
}

pub fn check_case(case: &str, env: &[(&str, &str)]) -> String {
    check_on_stub(&format!("cuda-{case}-{}", env.len()), program, case, env)
}

/// Runs one case plain, under AddressSanitizer and UBSan, and under valgrind; returns what it said.
pub fn check_on_stub<'a>(
    name: &str,
    program: impl Fn(bool) -> Program<'a>,
    case: &str,
    env: &[(&str, &str)],
) -> String {
    need_kernels();
    need_tool("valgrind", "valgrind");
    let folder = scratch(name);
    stub_cuda::build(&folder);
    let command = |program: &Path, before: &[&str]| {
        let mut words = before.iter().map(Path::new).chain([program]);
        let mut command = Command::new(words.next().expect("a program"));
        command.args(words).arg(&folder).arg(case);
        command.env("LD_LIBRARY_PATH", &folder).envs(env.iter().copied());
        command
    };
    let plain = program(false).compile(&folder);
    let output = run(&mut command(&plain, &[]));
    let sanitized = program(true).compile(&folder);
    run(command(&sanitized, &[]).env("ASAN_OPTIONS", "detect_leaks=1"));
    run(&mut command(
        &plain,
        &[
            "valgrind",
            "-q",
            "--error-exitcode=99",
            "--leak-check=full",
            "--show-leak-kinds=definite",
            "--errors-for-leak-kinds=definite",
        ],
    ));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn run_calls_only_launch() {
    print!("{}", check_case("runs", &[]));
}

/// Devices of compute capability 9.0 have kernels of their own, in clusters unless none runs there.
#[test]
fn every_architecture_has_its_kernels() {
    for (capability, blocks, kernel, cluster, overlaps) in [
        ("80", "128", "blockem_encode_f32_8", "1", "0"),
        ("100", "128", "blockem_encode_f32_8", "1", "1"),
        ("90", "128", "blockem_resident_f32_8", "8", "1"),
        ("90", "4", "blockem_resident_f32_8", "4", "1"),
        ("90", "0", "blockem_encode_f32_sm90", "1", "1"),
    ] {
        let numerics = format!("cuda-2-sm{capability}");
        check_case(
            "kernels",
            &[
                ("STUB_CUDA_CAPABILITY", capability),
                ("STUB_CUDA_BLOCKS", blocks),
                ("NUMERICS", &numerics),
                ("KERNEL", kernel),
                ("CLUSTER", cluster),
                ("OVERLAPS", overlaps),
            ],
        );
    }
}

#[test]
fn pointers_are_looked_up() {
    check_case("pointers", &[]);
}

#[test]
fn raw_calls() {
    print!("{}", check_case("raw", &[]));
}

#[test]
fn captures() {
    check_case("capture", &[]);
}

#[test]
fn a_forked_child() {
    check_case("forked", &[]);
}

#[test]
fn a_driver_that_is_gone() {
    check_case("at-exit", &[]);
}

#[test]
fn driver_failures() {
    check_case("failures", &[]);
}

#[test]
fn no_device() {
    check_case("no-device", &[("STUB_CUDA_DEVICES", "0")]);
}

#[test]
fn a_driver_that_another_process_initialised() {
    check_case("forked-before", &[("STUB_CUDA_INIT", "3")]);
}

/// Kernels load in the drivers of their toolkit's major version and in later ones.
#[test]
fn an_old_driver() {
    need_kernels();
    let toolkit: u32 = env!("BLOCKEM_TOOLKIT").parse().expect("1000 major + 10 minor");
    let needed = format!("{}.0", toolkit / 1000);
    for (version, found, needed) in
        [("11080", "11.8", "12.0"), ("12000", "12.0", &*needed), ("12090", "12.9", &needed)]
    {
        if toolkit < 13000 && version > "12" {
            continue;
        }
        check_case(
            "old-driver",
            &[("STUB_CUDA_VERSION", version), ("FOUND", found), ("NEEDED", needed)],
        );
    }
}

#[test]
fn a_newer_driver() {
    check_case("runs", &[("STUB_CUDA_VERSION", "14020")]);
}

#[test]
fn a_device_that_is_too_old() {
    check_case("old-device", &[("STUB_CUDA_CAPABILITY", "75")]);
}

#[test]
fn no_driver() {
    let folder = scratch("cuda-no-driver");
    let plain = program(false).compile(&folder);
    // An empty file of that name is no driver, on machines that have one too.
    std::fs::write(folder.join("libcuda.so.1"), "").expect("write");
    run(Command::new(plain).arg(&folder).arg("no-driver").env("LD_LIBRARY_PATH", &folder));
}

/// examples/cuda compiles and links with the toolkit that made the kernels; it runs on a GPU only.
#[test]
fn example_with_the_cuda_runtime() {
    need_kernels();
    let home = Path::new(env!("BLOCKEM_TOOLKIT_HOME"));
    let header = home.join("include/cuda_runtime_api.h");
    assert!(header.is_file(), "{} is missing: pip install -r requirements.txt", header.display());
    let folder = scratch("cuda-example");
    let object = folder.join("penalty.o");
    let mut compiler = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    compiler.args(["-std=c++17", "-O1", "-c", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow"]);
    compiler.arg("-Werror").arg("-I").arg(root().join("include"));
    compiler.arg("-isystem").arg(home.join("include")).arg("-o").arg(&object);
    run(compiler.arg(root().join("examples/cuda/penalty.cpp")));
    let runtimes = ["lib", "lib64"].map(|lib| home.join(lib)).into_iter();
    let mut files = runtimes.filter_map(|lib| std::fs::read_dir(lib).ok()).flatten().flatten();
    let runtime = files.find(|file| file.file_name().to_string_lossy().starts_with("libcudart.so"));
    let runtime = runtime.expect("the toolkit has libcudart").path();
    let mut linker = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    linker.arg("-o").arg(folder.join("penalty")).arg(&object).arg("-L").arg(library_dir());
    linker.arg("-lblockem").arg(&runtime);
    for library in [library_dir(), runtime.parent().expect("a folder").to_path_buf()] {
        linker.arg(format!("-Wl,-rpath,{}", library.display()));
    }
    run(&mut linker);
}
