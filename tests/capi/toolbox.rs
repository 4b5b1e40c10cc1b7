//! Compiles and runs the C and C++ programs of the ABI's tests.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo put libblockem.so and libblockem.a of this very build: beside this test's own
/// executable. (target/<profile>/ has copies, but only `cargo build` refreshes those.)
pub fn library_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("the path of this test");
    let dir = exe.parent().expect("the test lies in a folder").to_path_buf();
    for name in ["libblockem.so", "libblockem.a"] {
        let path = dir.join(name);
        assert!(path.is_file(), "{} is missing: run this test with cargo", path.display());
    }
    dir
}

/// An empty folder of this name under cargo's own scratch folder.
pub fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("capi").join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("create the scratch folder");
    dir
}

#[derive(Clone, Copy, PartialEq)]
pub enum Link {
    Shared,
    Static,
}

/// A program to be compiled, warnings being errors.
pub struct Program<'a> {
    /// Relative to the repository.
    pub sources: &'a [&'a str],
    /// A -std of the C or the C++ compiler, such as "c99" or "c++17".
    pub dialect: &'a str,
    pub sanitize: bool,
    pub link: Link,
    /// A folder of others' headers.
    pub headers: Option<&'a Path>,
}

impl Program<'_> {
    /// The executable, in `folder`.
    pub fn compile(&self, folder: &Path) -> PathBuf {
        let exe = folder.join(if self.sanitize { "sanitized" } else { "program" });
        let mut compiler = self.compiler();
        compiler.arg(format!("-std={}", self.dialect));
        compiler.args(["-D_POSIX_C_SOURCE=200809L", "-g", "-O1", "-fno-omit-frame-pointer"]);
        compiler.args(["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror"]);
        if self.sanitize {
            compiler.args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]);
        }
        compiler.arg("-I").arg(root().join("include"));
        compiler.args(self.headers.iter().flat_map(|folder| [Path::new("-isystem"), folder]));
        compiler.args(self.sources.iter().map(|source| root().join(source)));
        // What follows the sources is neither C nor C++.
        compiler.args(["-x", "none", "-o"]).arg(&exe);
        let libraries = library_dir();
        match self.link {
            Link::Shared => {
                compiler.arg("-L").arg(&libraries).arg("-lblockem");
                compiler.arg(format!("-Wl,-rpath,{}", libraries.display()));
            }
            Link::Static => {
                compiler.arg(libraries.join("libblockem.a")).args(native_static_libraries());
            }
        }
        compiler.args(["-lm", "-lpthread", "-ldl"]);
        run(&mut compiler);
        exe
    }

    fn compiler(&self) -> Command {
        let (variable, default, language) = match self.dialect.starts_with("c++") {
            true => ("CXX", "c++", "c++"),
            false => ("CC", "cc", "c"),
        };
        let name = std::env::var_os(variable).unwrap_or_else(|| default.into());
        let mut command = Command::new(name);
        command.args(["-x", language]);
        command
    }
}

/// The system libraries that a static Rust library needs, as rustc itself says.
pub fn native_static_libraries() -> Vec<String> {
    let folder = scratch("native-static-libs");
    let source = folder.join("empty.rs");
    std::fs::write(&source, "").expect("write the empty library");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut command = Command::new(rustc);
    command.args(["--crate-type", "staticlib", "--print", "native-static-libs", "--out-dir"]);
    let output = run(command.arg(&folder).arg(&source));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let list = text.lines().find_map(|line| line.split_once("native-static-libs: "));
    let (_, list) = list.unwrap_or_else(|| panic!("rustc does not list the libraries:\n{text}"));
    list.split_whitespace().map(str::to_owned).collect()
}

/// Runs to success within ten minutes, or fails the test with all that was said.
pub fn run(command: &mut Command) -> Output {
    let mut limited = Command::new("timeout");
    limited.arg("--kill-after=10").arg("600").arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(key, value),
            None => limited.env_remove(key),
        };
    }
    if command.get_program() == "valgrind" {
        // Its processor has no AVX-512, whichever set tests/isa.py chose.
        limited.env_remove("BLOCKEM_TEST_ISA");
    }
    let line = shell_line(command);
    let output = limited.output().unwrap_or_else(|e| panic!("cannot run {line}: {e}"));
    let said = [output.stdout.as_slice(), output.stderr.as_slice()].map(last_lines).concat();
    match output.status.code() {
        Some(0) => output,
        Some(124 | 137) => panic!("no end within ten minutes: {line}\n{said}"),
        Some(127) => panic!("not found: {line}\n{said}"),
        _ => panic!("{}: {line}\n{said}", output.status),
    }
}

/// Fails with the remedy when a tool is missing: a check that cannot run is not passed.
pub fn need_tool(name: &str, package: &str) {
    let found = Command::new(name).arg("--version").output();
    assert!(
        found.is_ok_and(|output| output.status.success()),
        "{name} is missing; `make test` installs it, or: apt-get install {package}"
    );
}

fn shell_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

/// The end of a program's output, without the progress that other tests read.
fn last_lines(text: &[u8]) -> String {
    const SHOWN: usize = 60;
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().filter(|l| !l.starts_with("reached ") && !l.starts_with("named "));
    let lines: Vec<&str> = lines.collect();
    let skipped = lines.len().saturating_sub(SHOWN);
    lines[skipped..].iter().map(|line| format!("{line}\n")).collect()
}
