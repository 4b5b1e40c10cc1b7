//! Compiles kernels/*.cu with nvcc, where there is one, into the images that src/backend/cuda/
//! embeds. Without nvcc the build goes on, says so, and answers NO_KERNEL_IMAGE at run time.
//!
//! nvcc is, in this order: BLOCKEM_NVCC (a path; "none" builds without kernels), CUDA_HOME/bin,
//! CUDA_PATH/bin, PATH, the pip wheel in the checkout's .venv/cuda or .venv, that of python3 on PATH.

use std::env;
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Devices with code of their own: A100, A10/RTX 30, L4/RTX 40, H100/H200, B100/B200, RTX 50. PTX of
/// the last serves what comes later.
const ARCHITECTURES: [&str; 6] = ["80", "86", "89", "90a", "100", "120"];
/// H100 and H200 have all of their own instructions, and kernels of their own: NAME_sm90.cu, where
/// there is one, instead of NAME.cu.
const SM90: &str = "90a";

/// The first that knows them all.
const OLDEST_TOOLKIT: u32 = 12080;

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    let kernels = kernels();
    let images = match find_nvcc() {
        None => {
            println!(
                "cargo:warning=no nvcc of CUDA 12.8 or later: this libblockem will have no CUDA \
                 kernels. For the GPU, put nvcc on PATH, set CUDA_HOME or BLOCKEM_NVCC, or `pip \
                 install --no-deps --target .venv/cuda -r requirements-cuda.txt`, and touch build.rs"
            );
            Images::default()
        }
        Some(nvcc) => match compile(&nvcc, &kernels) {
            Ok(images) => images,
            // A library without the kernels that were to be expected would be a surprise.
            Err(error) => {
                let (nvcc, error) = (nvcc.display(), error.replace('\n', " | "));
                println!("cargo::error={nvcc}: {error} (BLOCKEM_NVCC=none builds without kernels)");
                Images::default()
            }
        },
    };
    // For the tests: one compares versions, one compiles examples/cuda with the toolkit's headers.
    println!("cargo:rustc-env=BLOCKEM_TOOLKIT={}", images.toolkit);
    println!("cargo:rustc-env=BLOCKEM_TOOLKIT_HOME={}", images.home.display());
    let path = out_dir().join("images.rs");
    std::fs::write(&path, images.source()).expect("write into OUT_DIR");
}

#[derive(Default)]
struct Images {
    /// As the driver counts: 13000 for CUDA 13.0.
    toolkit: u32,
    /// The folder with bin/nvcc, include and lib.
    home: PathBuf,
    files: Vec<(String, PathBuf)>,
}

impl Images {
    fn source(&self) -> String {
        let mut text = format!("const TOOLKIT: i32 = {};\n", self.toolkit);
        text += "static IMAGES: &[(&str, &Aligned<[u8]>)] = &[\n";
        for (name, path) in &self.files {
            writeln!(text, "    ({name:?}, &Aligned(*include_bytes!({path:?}))),").unwrap();
        }
        text + "];\n"
    }
}

fn out_dir() -> PathBuf {
    env::var_os("OUT_DIR").expect("cargo sets OUT_DIR").into()
}

/// kernels/*.cu in a fixed order.
fn kernels() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("kernels").into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "cu"));
    paths.sort();
    paths
}

// ---- nvcc --------------------------------------------------------------------------------------

/// The option's, whatever it is; else the first that knows every device.
fn find_nvcc() -> Option<PathBuf> {
    // Not PATH: every pip build has one of its own, and would compile all again.
    for variable in ["BLOCKEM_NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if let Some(given) = env::var_os("BLOCKEM_NVCC").filter(|given| !given.is_empty()) {
        return (given != "none").then(|| given.into());
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let homes = homes.map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let nearby = homes.chain(env::split_paths(&path)).chain(wheel_folders(Path::new(".venv")));
    let name = format!("nvcc{}", env::consts::EXE_SUFFIX);
    let knows_every_device = |folder: PathBuf| -> Option<PathBuf> {
        let nvcc = folder.join(&name);
        (nvcc.is_file() && version(&nvcc).is_ok_and(|v| v >= OLDEST_TOOLKIT)).then_some(nvcc)
    };
    let found = nearby.into_iter().find_map(knows_every_device);
    found.or_else(|| python_folders().into_iter().find_map(knows_every_device))
}

/// Where NVIDIA's wheels put programs below a virtual environment: make's own folder for them first.
fn wheel_folders(venv: &Path) -> Vec<PathBuf> {
    let libraries = std::fs::read_dir(venv.join("lib")).into_iter().flatten().flatten();
    let sites = libraries.map(|python| python.path().join("site-packages"));
    let sites = std::iter::once(venv.join("cuda")).chain(sites);
    sites.flat_map(|site| package_folders(&site)).collect()
}

/// site-packages/nvidia/*/bin, the newest toolkit first.
fn package_folders(site: &Path) -> Vec<PathBuf> {
    let packages = std::fs::read_dir(site.join("nvidia")).into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = packages.map(|package| package.path().join("bin")).collect();
    folders.sort();
    folders.reverse();
    folders
}

fn python_folders() -> Vec<PathBuf> {
    let code = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
    let output = Command::new("python3").args(["-c", code]).output();
    let Some(output) = output.ok().filter(|output| output.status.success()) else {
        return Vec::new();
    };
    package_folders(Path::new(String::from_utf8_lossy(&output.stdout).trim()))
}

// ---- Compilation -------------------------------------------------------------------------------

fn compile(nvcc: &Path, kernels: &[PathBuf]) -> Result<Images> {
    println!("cargo:rerun-if-changed={}", nvcc.display());
    let toolkit = version(nvcc)?;
    let real = std::fs::canonicalize(nvcc).unwrap_or_else(|_| nvcc.to_path_buf());
    let home = real.ancestors().nth(2).unwrap_or(Path::new("")).to_path_buf();
    let mut images = Images { toolkit, home, files: Vec::new() };
    let mut reports = Vec::new();
    for kernel in kernels {
        let name = kernel.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let image = out_dir().join(format!("{name}.fatbin"));
        let mut command = Command::new(nvcc);
        command.args(["-std=c++17", "-O3", "-Ikernels", "-fatbin", "--threads", "0"]);
        // Registers and spills of each, for tests/compile_kernels.sh.
        command.args(["-Xptxas", "-v"]);
        // Drivers that load what this toolkit makes can unpack it; older ones cannot.
        if toolkit >= 13000 {
            command.arg("--compress-mode=size");
        }
        let is_sm90 = name.ends_with("_sm90");
        let sm90_has_other = kernel.with_file_name(format!("{name}_sm90.cu")).is_file();
        for architecture in ARCHITECTURES {
            let is_served = if architecture == SM90 { !sm90_has_other } else { !is_sm90 };
            if !is_served {
                continue;
            }
            command.arg(format!("-gencode=arch=compute_{architecture},code=sm_{architecture}"));
        }
        if !is_sm90 {
            let newest = ARCHITECTURES[ARCHITECTURES.len() - 1];
            command.arg(format!("-gencode=arch=compute_{newest},code=compute_{newest}"));
        }
        command.arg(kernel);
        // Profiles have a folder each; what nvcc made for one serves them all.
        let made = shared_dir()?.join(format!("{name}-{}.fatbin", key(&command, toolkit)));
        let report = made.with_extension("txt");
        if !made.is_file() {
            let said = run(command.arg("-o").arg(&image))?;
            std::fs::write(&report, said).map_err(|e| e.to_string())?;
            let whole = made.with_extension(std::process::id().to_string());
            std::fs::copy(&image, &whole).map_err(|e| e.to_string())?;
            std::fs::rename(&whole, &made).map_err(|e| e.to_string())?;
        }
        std::fs::copy(&made, &image).map_err(|e| e.to_string())?;
        images.files.push((name, image));
        reports.push(report);
    }
    let lines: String = reports.iter().map(|path| format!("{}\n", path.display())).collect();
    std::fs::write(shared_dir()?.join("reports"), lines).map_err(|e| e.to_string())?;
    Ok(images)
}

/// Below cargo's target folder, which is four above target/<profile>/build/<package>/out.
fn shared_dir() -> Result<PathBuf> {
    let out = out_dir();
    let folder = out.ancestors().nth(4).unwrap_or(&out).join("blockem-kernels");
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    Ok(folder)
}

/// Names all that an image is made of.
fn key(command: &Command, toolkit: u32) -> String {
    let mut hash = DefaultHasher::new();
    (format!("{command:?}"), toolkit).hash(&mut hash);
    let entries = std::fs::read_dir("kernels").into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        (std::fs::read(&path).unwrap_or_default(), path).hash(&mut hash);
    }
    format!("{:016x}", hash.finish())
}

/// From "release 13.0, V13.0.88".
fn version(nvcc: &Path) -> Result<u32> {
    let text = run(Command::new(nvcc).arg("--version"))?;
    let release = text.split_once("release ").and_then(|(_, rest)| rest.split_once(','));
    let number = release.and_then(|(release, _)| {
        let (major, minor) = release.split_once('.')?;
        Some(major.parse::<u32>().ok()? * 1000 + minor.parse::<u32>().ok()? * 10)
    });
    number.ok_or_else(|| format!("does not say its version: {text}"))
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| format!("cannot run: {e}"))?;
    let text = [output.stdout, output.stderr].map(|t| String::from_utf8_lossy(&t).into_owned());
    if output.status.success() { Ok(text.concat()) } else { Err(text.concat()) }
}
