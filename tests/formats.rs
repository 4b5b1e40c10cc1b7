//! Every public layout: files written by their owners' code, against the owners' own values.
//!
//! tests/data/formats is made by tests/make_format_fixtures.py; each folder's note.json says whose
//! code wrote the files and computed the values.

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use blockem::error::{Error, Status};
use blockem::latents::Latents;
use blockem::penalty::{EncodeArgs, WORKSPACE_ALIGN};
use blockem::plan::{Activation, BackendKind, Plan, PlanOptions};
use blockem::sae::{Architecture, EncoderRows, Sae, SaeOptions, Site};
use blockem::tensor::{Tensor, TensorMut};
use safetensors::SafeTensors;
use serde_json::{Map, Value, json};

/// What must be known besides the files, by fixture.
fn given(name: &str) -> SaeOptions {
    let recipe = match name {
        "qresearch" => json!({"format": "qresearch"}),
        "mwhanna" | "mwhanna_typo" => json!({"format": "mwhanna"}),
        "qwen_scope" => json!({"format": "qwen_scope", "k": 6}),
        "qwen_scope_bf16" => json!({"format": "qwen_scope", "k": 5}),
        _ => Value::Null,
    };
    let input_scale = match name {
        "llama_scope_r1_distill" => note(name)["needs"]["scale"].as_f64(),
        _ => None,
    };
    SaeOptions { recipe: recipe.as_object().cloned(), input_scale }
}

/// Layouts that are not read yet, or never: each says so with this status.
const REFUSED: [(&str, Status); 6] = [
    ("dl_backup", Status::Unsupported),
    ("dl_batch_topk_old", Status::RecipeIncomplete),
    ("dl_batch_topk_uncalibrated", Status::RecipeIncomplete),
    ("dl_matryoshka_uncalibrated", Status::RecipeIncomplete),
    ("openmoss_batch_norm", Status::Unsupported),
    ("openmoss_no_norm", Status::NonFinite),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats")
}

fn note(name: &str) -> Value {
    serde_json::from_slice(&fs::read(root().join(name).join("note.json")).unwrap()).unwrap()
}

fn open(name: &str, options: &SaeOptions) -> Result<Sae, Error> {
    Sae::open(root().join(name).join(note(name)["path"].as_str().unwrap()), options)
}

fn names() -> Vec<String> {
    let entries = fs::read_dir(root()).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// x [T, d] and z [T, F] of an expectation.
fn expected(name: &str, file: &str) -> (Vec<f64>, Vec<f64>) {
    let bytes = fs::read(root().join(name).join(file)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let x = file.tensor("x").unwrap().data().to_vec();
    let z = file.tensor("z").unwrap().data().to_vec();
    let narrow = x.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b) as f64);
    (narrow.collect(), z.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
}

/// All latents' z by the library itself: its f64 oracle, or the CPU's kernels in f32.
fn encode(sae: &Sae, activation: Activation, backend: BackendKind, x: &[f64]) -> Vec<f64> {
    let (d, count) = (sae.recipe().d_in, sae.recipe().d_sae);
    let tokens = x.len() / d;
    let ids: Vec<i64> = (0..count as i64).collect();
    let latents = Latents::new(&ids, &vec![1; count], None).unwrap();
    let options = PlanOptions { activation, backend, ..PlanOptions::default() };
    let plan = Plan::new(sae, &latents, &options).unwrap();
    let mut space = vec![0u8; plan.workspace_size(tokens) + WORKSPACE_ALIGN];
    let skip = space.as_ptr().align_offset(WORKSPACE_ALIGN);
    let workspace = (&mut space[skip..]).into();
    let narrow: Vec<f32> = x.iter().map(|x| *x as f32).collect();
    if backend == BackendKind::Reference {
        let mut z = vec![f64::NAN; tokens * count];
        let hidden = Tensor::from_slice(x, &[tokens, d]).unwrap();
        let latents = TensorMut::from_slice(&mut z, &[tokens, count]).unwrap();
        plan.encode(&mut EncodeArgs { hidden, latents, workspace }).unwrap();
        return z;
    }
    let mut z = vec![f32::NAN; tokens * count];
    let hidden = Tensor::from_slice(&narrow, &[tokens, d]).unwrap();
    let latents = TensorMut::from_slice(&mut z, &[tokens, count]).unwrap();
    plan.encode(&mut EncodeArgs { hidden, latents, workspace }).unwrap();
    z.into_iter().map(f64::from).collect()
}

fn gather_all(sae: &Sae) -> EncoderRows {
    sae.gather(&(0..sae.recipe().d_sae as u64).collect::<Vec<_>>()).unwrap()
}

fn check_values(name: &str, sae: &Sae, file: &str) {
    let (x, z) = expected(name, file);
    let activation = match file {
        "expected_relu.safetensors" => Activation::DenseRelu,
        _ => Activation::Native,
    };
    let largest = z.iter().fold(1.0f64, |m, v| m.max(v.abs()));
    // The oracle's only error is the rounding of folded rows to f32; the kernels add their own.
    for (backend, roundings) in [(BackendKind::Reference, 4.0), (BackendKind::Cpu, 16.0)] {
        let ours = encode(sae, activation, backend, &x);
        assert_eq!(ours.len(), z.len(), "{name}");
        for (i, (a, b)) in ours.iter().zip(&z).enumerate() {
            let close = (a - b).abs() <= roundings * f32::EPSILON as f64 * largest;
            let owner = &note(name)["owner"];
            assert!(close, "{name} on {backend:?}: z[{i}] is {a}, {owner} says {b}");
        }
    }
}

#[test]
fn values_are_the_owners() {
    let mut read = 0;
    for name in names() {
        if let Some((_, status)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            let error = open(&name, &given(&name)).err().expect(&name);
            assert_eq!(error.status, *status, "{name}: {error}");
            continue;
        }
        assert_eq!(note(&name)["must"], "loads", "{name} must be refused");
        let sae = open(&name, &given(&name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let file = match &name[..] {
            // The owner keeps the largest of a batch; what comes before that is a latent's own.
            "goodfire_r1_logic" | "goodfire_r1_math" => "expected_relu.safetensors",
            "openmoss_batchtopk" | "openmoss_glu_batchtopk" => continue,
            _ => "expected.safetensors",
        };
        check_values(&name, &sae, file);
        read += 1;
    }
    assert!(read >= 40, "only {read} fixtures");
}

/// The two public readers of Llama Scope disagree; both are there, by name.
#[test]
fn llama_scope_is_read_by_either_rule() {
    let recipe = json!({"reader": "saelens-compat"}).as_object().cloned();
    let options = SaeOptions { recipe, ..SaeOptions::default() };
    let theirs = open("llama_scope", &options).unwrap();
    check_values("llama_scope", &theirs, "expected_saelens.safetensors");
    let authors = open("llama_scope", &SaeOptions::default()).unwrap();
    assert_ne!(theirs.recipe().format, authors.recipe().format);
    assert_ne!(gather_all(&theirs), gather_all(&authors));
}

/// The second encoder of an OpenMOSS SAE is neither overlooked nor made up.
#[test]
fn a_glu_encoder_is_told_and_must_be_whole() {
    let sae = open("openmoss_glu", &SaeOptions::default()).unwrap();
    assert!(sae.recipe().glu);
    assert_eq!(sae.describe().unwrap()["glu"], true);
    assert!(!open("openmoss_relu", &SaeOptions::default()).unwrap().recipe().glu);
    let said = |glu: bool| SaeOptions {
        recipe: json!({ "use_glu_encoder": glu }).as_object().cloned(),
        ..SaeOptions::default()
    };
    for (name, glu, status, word) in [
        ("openmoss_glu", false, Status::Format, "use_glu_encoder"),
        ("openmoss_relu", true, Status::TensorMissing, "b_E_glu"),
    ] {
        let error = open(name, &said(glu)).err().unwrap();
        assert_eq!(error.status, status, "{name}: {error}");
        assert!(error.message.contains(word), "{name}: {error}");
    }
}

/// Under the other two activations u is what is rectified, or left as it is.
#[test]
fn a_glu_encoder_gates_in_every_activation() {
    for name in ["openmoss_glu", "openmoss_glu_topk", "openmoss_glu_batchtopk"] {
        let sae = open(name, &SaeOptions::default()).unwrap();
        let (d, count) = (sae.recipe().d_in, sae.recipe().d_sae);
        let rows = gather_all(&sae);
        let glu = rows.glu.as_ref().unwrap();
        let mut rng = support::Rng::of(7);
        let x: Vec<f64> = rng.normals(5 * d).iter().map(|x| *x as f64).collect();
        for (activation, backend) in [
            (Activation::DenseRelu, BackendKind::Reference),
            (Activation::Preactivation, BackendKind::Reference),
            (Activation::DenseRelu, BackendKind::Cpu),
            (Activation::Preactivation, BackendKind::Cpu),
        ] {
            let z = encode(&sae, activation, backend, &x);
            for (i, z) in z.iter().enumerate() {
                let (h, k) = (&x[i / count * d..][..d], i % count);
                let sum = |weight: &[f32], bias: &[f32]| -> f64 {
                    let products = weight[k * d..][..d].iter().zip(h);
                    products.map(|(w, h)| *w as f64 * h).sum::<f64>() + bias[k] as f64
                };
                let (value, gate) = (sum(&rows.weight, &rows.bias), sum(&glu.weight, &glu.bias));
                let u = value / (1.0 + (-gate).exp());
                let on = activation == Activation::Preactivation || u > 0.0;
                let expected = if on { u } else { 0.0 };
                assert!((z - expected).abs() <= 1e-5, "{name}, {activation:?}: {z} {expected}");
            }
        }
    }
}

/// What an owner's file becomes as one safetensors file is the same SAE.
#[test]
fn converted_files_have_the_same_rows() {
    let temp = tempfile::TempDir::new().unwrap();
    for name in names() {
        let Ok(sae) = open(&name, &given(&name)) else { continue };
        let out = temp.path().join("converted.safetensors");
        sae.convert(None, &out, &mut |_, _| {}).unwrap_or_else(|e| panic!("{name}: {e}"));
        let again =
            Sae::open(&out, &SaeOptions::default()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(gather_all(&again), gather_all(&sae), "{name}");
        let (told, recipe) = (again.describe().unwrap(), again.recipe());
        assert_eq!(told["converted"]["source_format"], sae.recipe().format, "{name}");
        assert_eq!(recipe.selection, sae.recipe().selection, "{name}");
        assert_eq!(recipe.glu, sae.recipe().glu, "{name}");
        assert_eq!(recipe.token_norm, sae.recipe().token_norm, "{name}");
        assert_eq!(again.recipe().k, sae.recipe().k, "{name}");
        assert_eq!(again.recipe().layer, sae.recipe().layer, "{name}");
        let ids = [5, 1, 7];
        sae.convert(Some(&ids), &out, &mut |_, _| {}).unwrap();
        let some = Sae::open(&out, &SaeOptions::default()).unwrap();
        assert_eq!(some.gather(&ids).unwrap(), sae.gather(&ids).unwrap(), "{name}");
    }
}

#[test]
fn layers_and_formats_are_told() {
    let cases = [
        ("goodfire_llama", "goodfire", Architecture::Standard, Some(19)),
        ("goodfire_r1_math", "goodfire_r1", Architecture::TopK, Some(37)),
        ("gemma_scope", "gemma_scope", Architecture::JumpRelu, Some(12)),
        ("gemma_scope_2", "gemma_scope_2", Architecture::JumpRelu, Some(5)),
        ("llama_scope", "llama_scope", Architecture::JumpRelu, Some(15)),
        ("llama_scope_r1_distill", "llama_scope_r1_distill", Architecture::JumpRelu, Some(15)),
        ("sparsify_topk", "sparsify", Architecture::TopK, Some(12)),
        ("dl_batch_topk", "dictionary_learning", Architecture::JumpRelu, Some(15)),
        ("dl_gated", "dictionary_learning", Architecture::Gated, Some(15)),
        ("qwen_scope", "qwen_scope", Architecture::TopK, Some(3)),
        ("qresearch", "qresearch", Architecture::Standard, Some(19)),
        ("openmoss_jumprelu", "openmoss", Architecture::JumpRelu, Some(3)),
        ("ckkissane", "hook_z", Architecture::Standard, Some(5)),
    ];
    for (name, format, architecture, layer) in cases {
        let sae = open(name, &given(name)).unwrap();
        let recipe = sae.recipe();
        assert_eq!(recipe.format, format, "{name}");
        assert_eq!(recipe.architecture, architecture, "{name}");
        assert_eq!(recipe.layer, layer, "{name}");
    }
}

/// The repository of a fixture, where its name tells something; else the fixture's own name.
fn repository(name: &str) -> &str {
    match name {
        "gemma_scope_transcoder" => "gemma-scope-2b-pt-transcoders",
        "gemma_scope_square" => "gemma-scope-2b-pt-mlp",
        "gemma_scope_zip64" => "gemma-scope-9b-pt-att",
        "gemma_scope" | "gemma_scope_deflated" | "gemma_scope_embedding" => "gemma-scope-2b-pt-res",
        "goodfire_llama" => "Llama-3.1-8B-Instruct-SAE-l19",
        other => other,
    }
}

/// Every file below a folder, relative to it.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path.strip_prefix(folder).unwrap().to_path_buf()),
            }
        }
    }
    files
}

/// A fixture as `git clone` lays it out, or as Hugging Face's cache does: files are links to blobs
/// that are named after their hashes.
fn lay_out(name: &str, root_of: &Path, cached: bool) -> PathBuf {
    let (from, repository) = (root().join(name), repository(name));
    let repo = match cached {
        true => root_of.join(format!("models--owner--{repository}")),
        false => root_of.join("owner").join(repository),
    };
    let top = if cached { repo.join("snapshots").join("0".repeat(40)) } else { repo.clone() };
    for (i, file) in files_below(&from).into_iter().enumerate() {
        let at = top.join(&file);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        if !cached {
            fs::copy(from.join(&file), &at).unwrap();
            continue;
        }
        let blob = repo.join("blobs").join(format!("{i:064x}"));
        fs::create_dir_all(blob.parent().unwrap()).unwrap();
        fs::copy(from.join(&file), &blob).unwrap();
        link(&blob, &at);
    }
    top.join(note(name)["path"].as_str().unwrap())
}

#[cfg(unix)]
fn link(target: &Path, at: &Path) {
    std::os::unix::fs::symlink(target, at).unwrap();
}

#[cfg(windows)]
fn link(target: &Path, at: &Path) {
    std::os::windows::fs::symlink_file(target, at).unwrap();
}

/// Names in Hugging Face's cache are the owner's: the links have them, and the blobs have not.
#[test]
fn every_format_is_the_same_from_hugging_faces_cache() {
    let temp = tempfile::TempDir::new().unwrap();
    for name in names() {
        let options = given(&name);
        let [plain, cached] = [false, true].map(|cached| {
            let root = temp.path().join(if cached { "hub" } else { "plain" }).join(&name);
            Sae::open(lay_out(&name, &root, cached), &options)
        });
        let (Ok(plain), Ok(cached)) = (plain, cached) else { continue };
        assert_eq!(cached.describe().unwrap(), plain.describe().unwrap(), "{name}");
        assert_eq!(gather_all(&cached), gather_all(&plain), "{name}");
    }
}

/// However the path is written, its names are found; those behind links only where it has none.
#[cfg(unix)]
#[test]
fn names_are_found_behind_every_way_to_write_a_path() {
    let temp = tempfile::TempDir::new().unwrap();
    let told = |recipe: &Value| ["site", "layer", "scale", "hook"].map(|key| recipe[key].clone());
    for (name, file) in [
        ("gemma_scope", "params.npz"),
        ("gemma_scope_embedding", "params.npz"),
        ("sparsify_topk", "sae.safetensors"),
        ("dl_topk", "ae.pt"),
    ] {
        let open = |path: &Path| {
            let sae = Sae::open(path, &SaeOptions::default());
            told(&sae.unwrap_or_else(|e| panic!("{}: {e}", path.display())).describe().unwrap())
        };
        let folder = lay_out(name, &temp.path().join(name), true);
        let right = open(&folder);
        assert_ne!(right[0], "unknown", "{name}");
        let (linked, copied) =
            (temp.path().join(format!("{name}_mine")), temp.path().join(format!("{name}_copy")));
        link(&folder, &linked);
        link(&lay_out(name, &copied, false).join(file), &temp.path().join(name).join(file));
        let climbing = folder.join("..").join(folder.file_name().unwrap());
        let ways: [PathBuf; 9] = [
            folder.join(file),
            folder.join(""),
            folder.join(".").join(file),
            climbing.clone(),
            climbing.join(file),
            linked.clone(),
            linked.join("."),
            linked.join(file),
            // A link of one's own to the file itself, whose configuration is then not beside it.
            temp.path().join(name).join(file),
        ];
        for way in ways.iter().take(if file == "params.npz" { 9 } else { 8 }) {
            assert_eq!(open(way), right, "{}", way.display());
        }
        // From inside the folder, where the path has no name but the file's, or none.
        for path in [file, "."] {
            let done = std::process::Command::new(env!("CARGO_BIN_EXE_blockem"))
                .args(["inspect", path, "--json"])
                .current_dir(&folder)
                .output()
                .unwrap();
            assert!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr));
            let recipe = serde_json::from_slice(&done.stdout).unwrap();
            assert_eq!(told(&recipe), right, "{name} from inside, {path}");
        }
    }
}

/// Where each owner's SAEs read. Sources: sae-lens 6.54.12 (pretrained_sae_loaders.py), the pages of
/// the repositories, hook_point_in and hf_hook_point_in of the files, and the owners' code that
/// tests/make_format_fixtures.py names.
#[test]
fn sites_are_the_owners() {
    use Site::*;
    let temp = tempfile::TempDir::new().unwrap();
    let cases = [
        ("goodfire_llama", BlockOutput, Some(19), Some(20)),
        ("goodfire_llama_70b", BlockOutput, Some(50), Some(51)),
        ("goodfire_r1_math", BlockOutput, Some(37), Some(38)),
        ("llama_scope", BlockOutput, Some(15), Some(16)),
        ("llama_scope_tc", NormOutput, Some(19), None),
        ("llama_scope_r1_distill_norm", BlockOutput, Some(15), Some(16)),
        ("openmoss_topk", BlockOutput, Some(3), Some(4)),
        ("openmoss_relu", NormOutput, Some(19), None),
        ("gemma_scope", BlockOutput, Some(12), Some(13)),
        ("gemma_scope_embedding", Embedding, None, Some(0)),
        ("gemma_scope_square", MlpOutput, Some(12), None),
        ("gemma_scope_zip64", AttentionZ, Some(5), None),
        ("gemma_scope_transcoder", NormOutput, Some(5), None),
        // Outside a folder with the repository's name nothing tells which of them it is.
        ("gemma_scope_fortran", Unknown, Some(7), None),
        ("gemma_scope_2", BlockOutput, Some(5), Some(6)),
        ("gemma_scope_2_no_config", BlockOutput, Some(5), Some(6)),
        ("gemma_scope_2_affine", MlpInput, Some(5), None),
        ("sparsify_topk", BlockOutput, Some(12), Some(13)),
        ("sparsify_expansion", MlpOutput, Some(3), None),
        ("sparsify_transcode", MlpInput, Some(7), None),
        ("sparsify_square", Embedding, None, None),
        ("dl_topk", BlockOutput, Some(15), Some(16)),
        ("openai_relu", MlpOutput, Some(6), None),
        ("openai_topk", BlockOutput, Some(8), Some(9)),
        ("qwen_scope", BlockOutput, Some(3), Some(4)),
        ("qresearch", BlockOutput, Some(19), Some(20)),
        ("mwhanna", MlpInput, Some(3), None),
        ("ckkissane", AttentionZ, Some(5), None),
    ];
    for (name, site, layer, index) in cases {
        let sae = Sae::open(lay_out(name, &temp.path().join(name), false), &given(name)).unwrap();
        let recipe = sae.recipe();
        let told = (recipe.site, recipe.layer, recipe.hidden_states_index);
        assert_eq!(told, (site, layer, index), "{name}");
        assert_eq!(sae.describe().unwrap()["site"], site.name(), "{name}");
        let out = temp.path().join("converted.safetensors");
        sae.convert(None, &out, &mut |_, _| {}).unwrap();
        let again = Sae::open(&out, &SaeOptions::default()).unwrap();
        let recipe = again.recipe();
        let told = (recipe.site, recipe.layer, recipe.hidden_states_index);
        assert_eq!(told, (site, layer, index), "{name}, converted");
    }
}

/// What folders and runs of the same formats say besides.
#[test]
fn folders_and_runs_name_sites() {
    use Site::*;
    let temp = tempfile::TempDir::new().unwrap();
    // A fixture's file, moved into a folder of that name.
    let moved = |name: &str, folder: &str| -> Sae {
        let source = root().join(name).join(note(name)["path"].as_str().unwrap());
        let at = temp.path().join(name).join(folder);
        fs::create_dir_all(&at).unwrap();
        for file in files_below(&source) {
            let text = fs::read_to_string(source.join(&file));
            match text.ok().filter(|_| file.ends_with("config.json")) {
                // The folder alone tells.
                Some(text) => {
                    let mut config: Value = serde_json::from_str(&text).unwrap();
                    if let Some(trainer) = config["trainer"].as_object_mut() {
                        trainer.remove("submodule_name");
                    }
                    fs::write(at.join(&file), config.to_string()).unwrap();
                }
                None => drop(fs::copy(source.join(&file), at.join(&file)).unwrap()),
            }
        }
        Sae::open(&at, &given(name)).unwrap()
    };
    for (name, folder, site, layer) in [
        ("gemma_scope_2_no_config", "mlp_out_all/layer_9_width_16k_l0_small", MlpOutput, Some(9)),
        ("gemma_scope_2_no_config", "attn_out/layer_9_width_16k_l0_big", AttentionZ, Some(9)),
        ("gemma_scope_2_no_config", "transcoder/layer_9_width_16k_l0_big", MlpInput, Some(9)),
        ("gemma_scope_2_no_config", "somewhere/layer_9_width_16k_l0_big", Unknown, Some(9)),
        ("sparsify_topk", "layers.3.self_attn", AttentionOutput, Some(3)),
        ("sparsify_topk", "h.3", BlockOutput, Some(3)),
        ("sparsify_topk", "gpt_neox.layers.3.mlp", MlpOutput, Some(3)),
        ("sparsify_topk", "layer_3", BlockOutput, Some(3)),
        ("sparsify_topk", "mine", Unknown, None),
        ("dl_topk", "mlp_out_layer_15/trainer_0", MlpOutput, Some(15)),
        ("dl_topk", "attention_out_layer_15/trainer_0", AttentionOutput, Some(15)),
        ("dl_topk", "mine/trainer_0", BlockOutput, Some(15)),
    ] {
        let sae = moved(name, folder);
        assert_eq!((sae.recipe().site, sae.recipe().layer), (site, layer), "{name} in {folder}");
    }
}

/// The caller's word stands over the file's, and hooks of another place are dropped.
#[test]
fn the_options_state_the_site() {
    use Site::*;
    let open = |name: &str, recipe: Value| {
        let mut options = given(name);
        options.recipe.get_or_insert_default().extend(recipe.as_object().unwrap().clone());
        open(name, &options)
    };
    let told = |name: &str, recipe: Value| {
        let sae = open(name, recipe.clone()).unwrap_or_else(|e| panic!("{name} {recipe}: {e}"));
        let recipe = sae.recipe().clone();
        (recipe.site, recipe.layer, recipe.hook)
    };
    let name = |hook: &str| Some(hook.to_string());
    assert_eq!(
        told("gemma_scope_fortran", json!({"site": "mlp_output"})),
        (MlpOutput, Some(7), None)
    );
    assert_eq!(
        told("gemma_scope_fortran", json!({"hook_name": "blocks.5.hook_resid_pre"})),
        (BlockOutput, Some(4), name("blocks.5.hook_resid_pre"))
    );
    assert_eq!(
        told("openmoss_topk", json!({"site": "block_output"})),
        (BlockOutput, Some(3), name("blocks.3.hook_resid_post"))
    );
    assert_eq!(told("openmoss_topk", json!({"site": "mlp_output"})), (MlpOutput, Some(3), None));
    assert_eq!(told("openmoss_topk", json!({"layer": 5})), (BlockOutput, Some(5), None));
    assert_eq!(
        told("sparsify_topk", json!({"site": "block_input"})),
        (BlockOutput, Some(11), None)
    );
    // The embedding's SAEs are read with its scale, whoever says that they are.
    let embedding = open("gemma_scope_fortran", json!({"site": "embedding"})).unwrap();
    let d = embedding.recipe().d_in as f64;
    assert_eq!(embedding.recipe().scale, 1.0 / d.sqrt());
    for (recipe, word) in [
        (json!({"site": "mlp_out"}), "attention_output, mlp_output"),
        (json!({"site": 4}), "a string"),
        (json!({"layer": -1}), "a whole number"),
        (json!({"hook_name": "blocks.3.hook_mlp_out", "layer": 4}), "layer is 4"),
        (json!({"hook_name": "blocks.3.hook_mlp_out", "site": "mlp_input"}), "site is mlp_input"),
    ] {
        let error =
            open("openmoss_topk", recipe.clone()).err().unwrap_or_else(|| panic!("{recipe}"));
        assert!(error.message.contains(word), "{recipe}: {error}");
    }
}

/// Tensors that fit several formats are an error that names the key which tells.
#[test]
fn what_files_do_not_tell_must_be_given() {
    for (name, key) in [("qresearch", "format"), ("mwhanna", "format"), ("qwen_scope", "format")] {
        let error = open(name, &SaeOptions::default()).err().expect(name);
        assert_eq!(error.status, Status::RecipeIncomplete, "{name}: {error}");
        assert!(error.message.contains(key), "{name}: {error}");
    }
    // Without its configuration a file is not taken for what its name suggests.
    let temp = tempfile::TempDir::new().unwrap();
    let run = root().join("dl_autoencoder_new").join("resid_post_layer_15/trainer_0");
    fs::copy(run.join("ae.pt"), temp.path().join("ae.pt")).unwrap();
    let error = Sae::open(temp.path(), &SaeOptions::default()).err().unwrap();
    assert_eq!(error.status, Status::RecipeIncomplete, "{error}");
    let half: Map<String, Value> = json!({"format": "qwen_scope"}).as_object().unwrap().clone();
    let options = SaeOptions { recipe: Some(half), ..SaeOptions::default() };
    let error = open("qwen_scope", &options).err().unwrap();
    assert!(error.message.contains("k is missing"), "{error}");
    let error = open("llama_scope_r1_distill", &SaeOptions::default()).err().unwrap();
    assert!(error.message.contains("input_scale"), "{error}");
    let temp = tempfile::TempDir::new().unwrap();
    fs::create_dir(temp.path().join("sae_weights.dcp")).unwrap();
    fs::copy(root().join("openmoss_relu/config.json"), temp.path().join("config.json")).unwrap();
    let error = Sae::open(temp.path(), &SaeOptions::default()).err().unwrap();
    assert_eq!(error.status, Status::Unsupported, "{error}");
    assert!(error.message.contains("sae_weights.dcp"), "{error}");
}
