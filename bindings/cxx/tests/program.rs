//! Compiles a C++ program against the bridge's headers and static library and runs it.

use std::path::{Path, PathBuf};
use std::process::Command;

use blockem::latents::Latents;
use blockem::penalty::{EncodeArgs, PenaltyArgs};
use blockem::plan::{Activation, BackendKind, Plan, PlanOptions};
use blockem::sae::{Sae, SaeOptions};
use blockem::tensor::{Tensor, TensorMut};

/// libblockem_cxx.a of this very build: the newest beside this test's own executable.
fn library() -> PathBuf {
    let exe = std::env::current_exe().expect("the path of this test");
    let deps = exe.parent().expect("the test lies in a folder").read_dir().unwrap();
    deps.map(|entry| entry.unwrap())
        .filter(|entry| {
            let name = entry.file_name().into_string().unwrap_or_default();
            name.starts_with("libblockem_cxx") && name.ends_with(".a")
        })
        .max_by_key(|entry| entry.metadata().unwrap().modified().unwrap())
        .expect("cargo builds the static library beside the test")
        .path()
}

/// loss_sum and |dH|^2 of the program's inputs, by the f64 oracle.
fn expected(sae: &Path) -> (f64, f64) {
    let sae = Sae::open(sae, &SaeOptions::default()).unwrap();
    let latents = Latents::new(&[3, 0, 5], &[1, -1, 1], None).unwrap();
    let options = PlanOptions {
        backend: BackendKind::Reference,
        activation: Activation::DenseRelu,
        ..PlanOptions::default()
    };
    let plan = Plan::new(&sae, &latents, &options).unwrap();
    let (tokens, d) = (9, plan.d_in());
    let base: Vec<f32> = (0..tokens * d).map(|i| ((i * 37 % 19) as f32 - 9.0) / 8.0).collect();
    let moved = |(i, b): (usize, &f32)| b + ((i * 11 % 7) as f32 - 3.0) / 8.0;
    let hidden: Vec<f32> = base.iter().enumerate().map(moved).collect();
    let view = |data| Tensor::from_slice(data, &[tokens, d]).unwrap();
    let mut reference = vec![0.0f64; tokens * 3];
    plan.encode(&mut EncodeArgs::new(
        view(&base),
        TensorMut::from_slice(&mut reference, &[tokens, 3]).unwrap(),
    ))
    .unwrap();
    let (mut loss, mut grad) = ([0.0f64], vec![0.0f32; tokens * d]);
    plan.penalty(&mut PenaltyArgs {
        hidden: Some(view(&hidden)),
        reference: Some(Tensor::from_slice(&reference, &[tokens, 3]).unwrap()),
        loss_sum: Some(TensorMut::from_slice(&mut loss, &[1]).unwrap()),
        grad_hidden: Some(TensorMut::from_slice(&mut grad, &[tokens, d]).unwrap()),
        scale: 0.5,
        ..PenaltyArgs::default()
    })
    .unwrap();
    (loss[0], grad.iter().map(|g| (*g as f64).powi(2)).sum())
}

fn assert_near(found: &str, expected: f64) {
    let found: f64 = found.parse().unwrap();
    assert!((found - expected).abs() <= 1e-4 * expected.abs(), "{found} is not {expected}");
}

#[test]
fn a_cpp_program_computes_the_penalty_and_catches_what_is_refused() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cxx_penalty");
    let status = Command::new("c++")
        .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", env!("BLOCKEM_CXX_INCLUDE")])
        .arg(here.join("tests/penalty.cpp"))
        .arg(library())
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(&program)
        .status()
        .expect("run c++");
    assert!(status.success(), "the program does not compile");
    let sae = here.join("../../tests/data/sae/standard");
    let output = Command::new(&program).arg(&sae).arg("no-such-file.json").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    println!("{text}");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<&str> = text.lines().collect();
    let (loss, grad) = expected(&sae);
    assert!(loss > 0.0);
    let words: Vec<&str> = lines[0].split(' ').collect();
    assert_near(words[1], loss);
    assert_eq!(words[3], "9");
    assert_eq!(lines[1], "split 1");
    assert_near(lines[2].strip_prefix("grad ").unwrap(), grad);
    assert_near(lines[3].strip_prefix("bf16 ").unwrap(), loss);
    assert_eq!(lines[4], "unmoved 0");
    assert!(lines[5].starts_with("refused IO: no-such-folder"), "{text}");
    assert!(lines[6].starts_with("refused IO: no-such-file.json"), "{text}");
    assert!(lines[7].starts_with("refused SHAPE: "), "{text}");
}
