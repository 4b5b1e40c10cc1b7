//! The command line: what it writes, its exit statuses, and that nothing is left half-written.

#[path = "support/stub_cuda.rs"]
mod stub_cuda;
mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blockem::penalty::{EncodeArgs, PenaltyArgs};
use blockem::plan::{Plan, PlanOptions};
use blockem::sae::{Sae, SaeOptions};
use blockem::tensor::{Tensor, TensorMut};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use support::Rng;

/// A folder with an SAE, a latent set and inputs.
struct Case {
    folder: tempfile::TempDir,
    d: usize,
    hidden: Vec<f32>,
    base: Vec<f32>,
    mask: Vec<u8>,
}

const TOKENS: usize = 301;
const F: usize = 40;

impl Case {
    fn new(rng: &mut Rng) -> Case {
        let d = 24;
        let case = Case {
            folder: tempfile::tempdir().unwrap(),
            d,
            hidden: rng.normals(TOKENS * d),
            base: rng.normals(TOKENS * d),
            mask: (0..TOKENS).map(|_| rng.below(2) as u8).collect(),
        };
        std::fs::create_dir(case.path("sae")).unwrap();
        let arrays = [
            ("W_enc", vec![d, F], rng.normals(d * F)),
            ("W_dec", vec![F, d], rng.normals(d * F)),
            ("b_enc", vec![F], rng.normals(F)),
            ("b_dec", vec![d], rng.normals(d)),
            ("threshold", vec![F], (0..F).map(|_| rng.unit() as f32).collect()),
        ];
        let arrays: Vec<_> = arrays.iter().map(|(n, s, v)| (*n, Dtype::F32, s, bytes(v))).collect();
        save(&case.path("sae/sae_weights.safetensors"), &arrays);
        let cfg = format!(
            r#"{{"architecture": "jumprelu", "d_in": {d}, "d_sae": {F}, "dtype": "float32",
                "apply_b_dec_to_input": true, "normalize_activations": "none",
                "metadata": {{"sae_lens_version": "6.54.12", "hook_name": "blocks.2.hook_resid_post"}}}}"#
        );
        std::fs::write(case.path("sae/cfg.json"), cfg).unwrap();
        std::fs::write(case.path("K0.json"), r#"{"K_pos": [3, 39], "K_neg": [0]}"#).unwrap();
        let shape = vec![TOKENS, d];
        save(
            &case.path("in.safetensors"),
            &[
                ("hidden", Dtype::F32, &shape, bytes(&case.hidden)),
                ("reference_hidden", Dtype::F32, &shape, bytes(&case.base)),
                ("mask", Dtype::U8, &vec![TOKENS], case.mask.clone()),
            ],
        );
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, args: &[&str]) -> Output {
        let exe = env!("CARGO_BIN_EXE_blockem");
        Command::new(exe).args(args).current_dir(self.folder.path()).output().unwrap()
    }

    fn penalty(&self, sae: &str, input: &str, output: &str) -> Output {
        let args = ["--sae", sae, "--latents", "K0.json", "--input", input, "--output", output];
        self.run(&[&["penalty"], &args[..]].concat())
    }

    /// Fails with one clear line and leaves nothing behind.
    fn refuses(&self, output: Output, says: &[&str]) {
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        for part in says {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
        assert!(!text.contains("panicked"), "{text}");
        let left = std::fs::read_dir(self.folder.path()).unwrap();
        for entry in left.map(|e| e.unwrap().file_name().into_string().unwrap()) {
            assert!(!entry.starts_with("out") && !entry.starts_with('.'), "{entry} was left");
        }
    }
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn save(path: &Path, arrays: &[(&str, Dtype, &Vec<usize>, Vec<u8>)]) {
    let views: HashMap<&str, TensorView<'_>> = arrays
        .iter()
        .map(|(name, dtype, shape, data)| {
            (*name, TensorView::new(*dtype, shape.to_vec(), data).unwrap())
        })
        .collect();
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).unwrap();
    match tensor.dtype() {
        Dtype::F32 => {
            tensor.data().as_chunks::<4>().0.iter().map(|c| f32::from_le_bytes(*c) as f64).collect()
        }
        Dtype::F64 => {
            tensor.data().as_chunks::<8>().0.iter().map(|c| f64::from_le_bytes(*c)).collect()
        }
        other => panic!("{name} is {other:?}"),
    }
}

#[test]
fn penalty_writes_what_the_library_computes() {
    let case = Case::new(&mut Rng::fresh());
    let done = case.penalty("sae", "in.safetensors", "out.safetensors");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));

    let sae = Sae::open(case.path("sae"), &SaeOptions::default()).unwrap();
    let set = blockem::latents::Latents::open(case.path("K0.json"), &sae).unwrap();
    let plan = Plan::new(&sae, &set, &PlanOptions::default()).unwrap();
    let (d, k) = (case.d, 3);
    let encode = |h: &[f32]| {
        let mut z = vec![0.0f32; TOKENS * k];
        let hidden = Tensor::from_slice(h, &[TOKENS, d]).unwrap();
        let latents = TensorMut::from_slice(&mut z, &[TOKENS, k]).unwrap();
        plan.encode(&mut EncodeArgs::new(hidden, latents)).unwrap();
        z
    };
    let (latents, reference) = (encode(&case.hidden), encode(&case.base));
    let (mut loss, mut grad) = ([0.0f64], vec![0.0f32; TOKENS * d]);
    let mut space = vec![0u8; plan.workspace_size(TOKENS) + 64];
    let skip = space.as_ptr().align_offset(64);
    plan.penalty(&mut PenaltyArgs {
        hidden: Some(Tensor::from_slice(&case.hidden, &[TOKENS, d]).unwrap()),
        reference: Some(Tensor::from_slice(&reference, &[TOKENS, k]).unwrap()),
        mask: Some(Tensor::from_slice(&case.mask, &[TOKENS]).unwrap()),
        loss_sum: Some(TensorMut::from_slice(&mut loss, &[1]).unwrap()),
        grad_hidden: Some(TensorMut::from_slice(&mut grad, &[TOKENS, d]).unwrap()),
        workspace: (&mut space[skip..]).into(),
        ..PenaltyArgs::default()
    })
    .unwrap();

    let data = std::fs::read(case.path("out.safetensors")).unwrap();
    let out = SafeTensors::deserialize(&data).unwrap();
    let wide = |v: &[f32]| v.iter().map(|x| *x as f64).collect::<Vec<f64>>();
    assert_eq!(floats(&out, "latents"), wide(&latents));
    assert_eq!(floats(&out, "reference"), wide(&reference));
    assert_eq!(floats(&out, "grad_hidden"), wide(&grad));
    assert_eq!(floats(&out, "loss_sum"), loss);
    let count: u32 = case.mask.iter().map(|m| *m as u32).sum();
    assert_eq!(floats(&out, "token_count"), [count as f64]);
    let per_latent: f64 = floats(&out, "latent_loss").iter().sum();
    assert!((per_latent - loss[0]).abs() < 1e-9 * loss[0]);
    assert_eq!(out.tensor("grad_hidden").unwrap().shape(), [TOKENS, d]);

    let first = std::fs::read(case.path("out.safetensors")).unwrap();
    assert!(case.penalty("sae", "in.safetensors", "out.safetensors").status.success());
    assert!(first == std::fs::read(case.path("out.safetensors")).unwrap(), "another run differs");
}

#[test]
fn reference_latents_serve_as_well_as_hidden_states() {
    let case = Case::new(&mut Rng::fresh());
    assert!(case.penalty("sae", "in.safetensors", "a.safetensors").status.success());
    let data = std::fs::read(case.path("a.safetensors")).unwrap();
    let first = SafeTensors::deserialize(&data).unwrap();
    let shape = vec![TOKENS, case.d];
    save(
        &case.path("in2.safetensors"),
        &[
            ("hidden", Dtype::F32, &shape, bytes(&case.hidden)),
            (
                "reference",
                Dtype::F32,
                &vec![TOKENS, 3],
                first.tensor("reference").unwrap().data().to_vec(),
            ),
            ("mask", Dtype::U8, &vec![TOKENS], case.mask.clone()),
        ],
    );
    assert!(case.penalty("sae", "in2.safetensors", "b.safetensors").status.success());
    assert!(data == std::fs::read(case.path("b.safetensors")).unwrap());
}

#[test]
fn a_partial_file_gives_the_same_penalty() {
    let case = Case::new(&mut Rng::fresh());
    let done = case.run(&["convert", "sae", "part.safetensors", "--latents", "K0.json"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(case.run(&["convert", "sae", "whole.safetensors"]).status.success());
    assert!(case.penalty("sae", "in.safetensors", "a.safetensors").status.success());
    for sae in ["part.safetensors", "whole.safetensors", "sae/cfg.json"] {
        assert!(case.penalty(sae, "in.safetensors", "b.safetensors").status.success());
        let [a, b] =
            ["a", "b"].map(|n| std::fs::read(case.path(&format!("{n}.safetensors"))).unwrap());
        assert!(a == b, "{sae} gives another penalty than the folder");
    }
    std::fs::write(case.path("K0.json"), r#"{"K_pos": [4], "K_neg": []}"#).unwrap();
    case.refuses(
        case.penalty("part.safetensors", "in.safetensors", "out.safetensors"),
        &["latent 4"],
    );
}

#[test]
fn inspect_prints_the_recipe() {
    let case = Case::new(&mut Rng::fresh());
    let done = case.run(&["inspect", "sae", "--json", "--sha256"]);
    assert!(done.status.success());
    let recipe: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(recipe["architecture"], "jumprelu");
    assert_eq!(recipe["d_in"], 24);
    assert_eq!(recipe["d_sae"], 40);
    assert_eq!(recipe["b_dec_subtracted"], true);
    assert_eq!(recipe["layer"], 2);
    assert_eq!(recipe["hidden_states_index"], 3);
    assert!(recipe["threshold"]["median"].as_f64().unwrap() > 0.0);
    assert_eq!(recipe["sha256"].as_str().unwrap().len(), 64);
    for key in ["format", "k", "dtype", "activation", "normalization", "scale", "hook"] {
        assert!(recipe.get(key).is_some(), "{key} is missing");
    }
    let text = String::from_utf8(case.run(&["inspect", "sae"]).stdout).unwrap();
    assert!(text.contains("blocks.2.hook_resid_post"), "{text}");
}

#[test]
fn bad_input_gives_one_line_and_no_file() {
    let case = Case::new(&mut Rng::fresh());
    let run = |sae: &str, input: &str| case.penalty(sae, input, "out.safetensors");
    case.refuses(run("nowhere", "in.safetensors"), &["nowhere"]);
    case.refuses(run("sae", "nowhere.safetensors"), &["nowhere.safetensors"]);

    let whole = std::fs::read(case.path("in.safetensors")).unwrap();
    std::fs::write(case.path("cut.safetensors"), &whole[..whole.len() - 1]).unwrap();
    case.refuses(run("sae", "cut.safetensors"), &["cut.safetensors", "truncated"]);

    let narrow = vec![TOKENS, case.d - 1];
    let hidden = bytes(&vec![0.0; TOKENS * (case.d - 1)]);
    save(&case.path("narrow.safetensors"), &[("hidden", Dtype::F32, &narrow, hidden)]);
    case.refuses(run("sae", "narrow.safetensors"), &["narrow.safetensors", "hidden", "24"]);

    let shape = vec![TOKENS, case.d];
    let hidden = bytes(&case.hidden);
    save(&case.path("alone.safetensors"), &[("hidden", Dtype::F32, &shape, hidden.clone())]);
    case.refuses(run("sae", "alone.safetensors"), &["reference_hidden"]);
    save(&case.path("none.safetensors"), &[("mask", Dtype::U8, &vec![1], vec![1])]);
    case.refuses(run("sae", "none.safetensors"), &["hidden", "missing"]);

    let there = case.penalty("sae", "in.safetensors", "no/such/out.safetensors");
    case.refuses(there, &["no/such/out.safetensors"]);
    std::fs::create_dir(case.path("folder")).unwrap();
    case.refuses(case.penalty("sae", "in.safetensors", "folder"), &["folder"]);

    std::fs::write(case.path("K0.json"), r#"{"K_pos": [40], "K_neg": []}"#).unwrap();
    case.refuses(run("sae", "in.safetensors"), &["latent 40"]);
    std::fs::write(case.path("K0.json"), "{").unwrap();
    case.refuses(run("sae", "in.safetensors"), &["K0.json", "JSON"]);

    std::fs::write(case.path("K0.json"), r#"{"K_pos": [1], "K_neg": []}"#).unwrap();
    std::fs::write(
        case.path("sae/cfg.json"),
        r#"{"architecture": "odd", "d_in": 24, "d_sae": 40}"#,
    )
    .unwrap();
    case.refuses(run("sae", "in.safetensors"), &["cfg.json", "odd"]);
    std::fs::write(case.path("sae/cfg.json"), "{\n\"d_in\": ").unwrap();
    case.refuses(run("sae", "in.safetensors"), &["cfg.json", "line 2"]);
}

#[test]
fn wrong_usage_exits_with_2() {
    let case = Case::new(&mut Rng::fresh());
    for args in [&["penalty"][..], &["penalty", "--sae"], &["nonsense"], &[], &["inspect"]] {
        assert_eq!(case.run(args).status.code(), Some(2), "{args:?}");
    }
    let rule = ["--activation", "swish"];
    let args = ["penalty", "--sae", "sae", "--latents", "K0.json", "--input", "a", "--output", "b"];
    assert_eq!(case.run(&[&args[..], &rule[..]].concat()).status.code(), Some(2));
    for rule in ["dense-relu", "dense_relu", "preactivation", "native"] {
        let args = ["penalty", "--sae", "sae", "--latents", "K0.json", "--input", "in.safetensors"];
        let rest = ["--output", "a.safetensors", "--activation", rule];
        assert!(case.run(&[&args[..], &rest[..]].concat()).status.success(), "{rule}");
    }
}

/// On the stub driver, which runs no kernel: what is checked is that the arrays travel, and that a
/// failure says what the driver said.
#[test]
#[cfg(target_os = "linux")]
fn penalty_on_a_device() {
    let case = Case::new(&mut Rng::fresh());
    let driver = tempfile::tempdir().unwrap();
    let run = |device: &str, failure: &str| {
        let call = ["penalty", "--sae", "sae", "--latents", "K0.json", "--input", "in.safetensors"];
        let rest = ["--device", device, "--output", "out.safetensors"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_blockem"));
        command.args(call).args(rest).current_dir(case.folder.path());
        command.env("LD_LIBRARY_PATH", driver.path()).env("STUB_CUDA_FAIL", failure);
        command.output().unwrap()
    };
    std::fs::write(driver.path().join("libcuda.so.1"), "").unwrap();
    case.refuses(run("cuda:0", ""), &["no CUDA driver"]);
    stub_cuda::build(driver.path());
    case.refuses(run("cuda:5", ""), &["cuda:5", "2 devices"]);
    case.refuses(run("cuda:0", "cuMemAlloc=2"), &["CUDA_ERROR_OUT_OF_MEMORY"]);
    case.refuses(run("cuda:0", "cuMemcpyDtoHAsync=700"), &["CUDA_ERROR_ILLEGAL_ADDRESS"]);
    let output = run("cuda:1", "");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let written = std::fs::metadata(case.path("out.safetensors")).unwrap().len();
    assert!(written > (TOKENS * case.d * 4) as u64, "only {written} bytes were written");
}
