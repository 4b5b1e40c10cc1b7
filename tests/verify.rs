//! `verify` on a world that a small SAE explains: read rightly nothing is flagged, and each of the
//! mistakes that loaders are known for is either impossible or flagged by its name.

mod support;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use blockem::error::Status;
use blockem::sae::{Sae, SaeOptions};
use blockem::verify::{VerifyOptions, report_lines, verify};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use support::Rng;

const D: usize = 128;
const F: usize = 160;
const K: usize = 4;
const SEQUENCES: usize = 12;
const LENGTH: usize = 24;

/// Features with directions, of which every token has K.
struct World {
    /// [F, d], of norm `norms`.
    features: Vec<f32>,
    norms: Vec<f32>,
    /// [d]
    offset: Vec<f32>,
    /// [T, d]: features and offset, in the SAE's units.
    hidden: Vec<f32>,
    folder: tempfile::TempDir,
}

impl World {
    fn new(rng: &mut Rng) -> World {
        let unit = |row: Vec<f32>| {
            let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt();
            row.into_iter().map(move |x| x / norm)
        };
        let features: Vec<f32> = (0..F).flat_map(|_| unit(rng.normals(D))).collect();
        let offset: Vec<f32> = rng.normals(D).iter().map(|x| 0.5 * x).collect();
        let mut hidden = Vec::new();
        for t in 0..SEQUENCES * LENGTH {
            let mut x = offset.clone();
            for _ in 0..K {
                let (feature, size) = (rng.below(F), 3.0 + 2.0 * rng.unit() as f32);
                let row = &features[feature * D..][..D];
                x.iter_mut().zip(row).for_each(|(x, f)| *x += size * f);
            }
            // An attention sink.
            if t % LENGTH == 0 {
                x.iter_mut().for_each(|x| *x *= 40.0);
            }
            hidden.extend(x);
        }
        let norms = (0..F).map(|_| 0.5 + 2.0 * rng.unit() as f32).collect();
        World { features, norms, offset, hidden, folder: tempfile::tempdir().unwrap() }
    }

    /// A SAELens folder that explains the world when read by `cfg`.
    fn sae(&self, name: &str, cfg: Value) -> PathBuf {
        let folder = self.folder.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        let mut config = json!({
            "architecture": "topk", "k": K, "d_in": D, "d_sae": F, "dtype": "float32",
            "apply_b_dec_to_input": true, "normalize_activations": "none",
            "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"},
        });
        config.as_object_mut().unwrap().extend(cfg.as_object().unwrap().clone());
        fs::write(folder.join("cfg.json"), config.to_string()).unwrap();
        let w_enc: Vec<f32> = (0..D)
            .flat_map(|i| (0..F).map(move |j| (i, j)))
            .map(|(i, j)| self.features[j * D + i])
            .collect();
        let mut tensors = vec![
            ("W_enc", vec![D, F], w_enc),
            ("W_dec", vec![F, D], self.features.clone()),
            ("b_enc", vec![F], vec![0.0; F]),
            ("b_dec", vec![D], self.offset.clone()),
        ];
        if config["architecture"] == "jumprelu" {
            tensors.push(("threshold", vec![F], vec![2.4; F]));
        }
        write(&folder.join("sae_weights.safetensors"), &tensors, None);
        folder
    }

    /// Hidden states whose unit is 1/s of the SAE's.
    fn hidden_file(&self, name: &str, scale: f32) -> PathBuf {
        let path = self.folder.path().join(name);
        let hidden = self.hidden.iter().map(|x| x / scale).collect();
        write(&path, &[("hidden", vec![SEQUENCES, LENGTH, D], hidden)], None);
        path
    }
}

type Named<'a> = (&'a str, Vec<usize>, Vec<f32>);

fn write(path: &Path, tensors: &[Named<'_>], metadata: Option<HashMap<String, String>>) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, _, values)| values.iter().flat_map(|x| x.to_le_bytes()).collect())
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(path, serialize(views, metadata).unwrap()).unwrap();
}

fn report_of(sae: &Path, hidden: &Path, recipe: Value, expected_l0: Option<f64>) -> Value {
    let options = SaeOptions { recipe: recipe.as_object().cloned(), input_scale: None };
    let sae = Sae::open(sae, &options).unwrap();
    verify(&sae, hidden, &VerifyOptions { expected_l0 }, &mut |_, _| {}).unwrap()
}

fn flags(report: &Value) -> Vec<&str> {
    report["flags"].as_array().unwrap().iter().map(|f| f["flag"].as_str().unwrap()).collect()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[test]
fn what_is_read_rightly_is_not_flagged() {
    let world = World::new(&mut Rng::fresh());
    let hidden = world.hidden_file("hidden.safetensors", 1.0);
    for cfg in [json!({}), json!({"architecture": "jumprelu"})] {
        let report = report_of(&world.sae("right", cfg), &hidden, Value::Null, None);
        assert_eq!(flags(&report), Vec::<&str>::new(), "{report:#}");
        let rest = &report["without_first_token"];
        assert!(number(&rest["explained_variance"]) > 0.7, "{report:#}");
        assert!(number(&rest["mean_l0"]) < 8.0, "{report:#}");
        assert_eq!(rest["tokens"], json!(SEQUENCES * (LENGTH - 1)));
        assert_eq!(report["first_tokens"], json!(SEQUENCES));
        assert!(report_lines(&report).contains("explained_variance"));
    }
}

/// A second encoder that halves what the first one finds, and a decoder that doubles it again.
#[test]
fn a_glu_encoder_is_verified_and_cannot_be_overlooked() {
    let world = World::new(&mut Rng::fresh());
    let hidden = world.hidden_file("hidden.safetensors", 1.0);
    for architecture in ["topk", "jumprelu"] {
        let path = world.folder.path().join(format!("{architecture}.safetensors"));
        let doubled = world.features.iter().map(|x| 2.0 * x).collect();
        let mut tensors = vec![
            ("W_enc", vec![F, D], world.features.clone()),
            ("W_dec", vec![F, D], doubled),
            ("b_enc", vec![F], vec![0.0; F]),
            ("b_dec", vec![D], world.offset.clone()),
            ("W_enc_glu", vec![F, D], vec![0.0; F * D]),
            ("b_enc_glu", vec![F], vec![0.0; F]),
        ];
        if architecture == "jumprelu" {
            tensors.push(("threshold", vec![F], vec![1.2; F]));
        }
        let cfg = json!({
            "architecture": architecture, "k": K, "d_in": D, "d_sae": F, "layout": "latent_major",
            "apply_b_dec_to_input": true, "use_glu_encoder": true,
        });
        write(&path, &tensors, Some(HashMap::from([("cfg".to_string(), cfg.to_string())])));
        let report = report_of(&path, &hidden, Value::Null, None);
        assert_eq!(flags(&report), Vec::<&str>::new(), "{report:#}");
        let rest = &report["without_first_token"];
        assert!(number(&rest["explained_variance"]) > 0.7, "{report:#}");
        assert!(number(&rest["mean_l0"]) < 8.0, "{report:#}");
        let recipe = json!({"use_glu_encoder": false}).as_object().cloned();
        let error = Sae::open(&path, &SaeOptions { recipe, input_scale: None }).err().unwrap();
        assert_eq!(error.status, Status::Format, "{error}");
        assert!(error.message.contains("use_glu_encoder"), "{error}");
    }
}

#[test]
fn topk_read_as_relu_is_flagged() {
    let world = World::new(&mut Rng::fresh());
    let (sae, hidden) = (world.sae("topk", json!({})), world.hidden_file("h.safetensors", 1.0));
    let report = report_of(&sae, &hidden, json!({"architecture": "standard"}), Some(K as f64));
    assert!(flags(&report).contains(&"l0"), "{report:#}");
    assert!(flags(&report).contains(&"topk_read_as_relu"), "{report:#}");
    let report = report_of(&sae, &hidden, json!({"architecture": "standard"}), None);
    assert!(flags(&report).contains(&"not_sparse"), "{report:#}");
}

#[test]
fn a_scale_that_is_missing_or_applied_twice_is_flagged() {
    let world = World::new(&mut Rng::fresh());
    // What the SAE was trained on has norm sqrt(d); here the states are in other units.
    let norms = world.hidden.chunks(D).enumerate().filter(|(t, _)| t % LENGTH != 0);
    let norms: Vec<f32> = norms.map(|(_, x)| x.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
    let mean = norms.iter().sum::<f32>() / norms.len() as f32;
    let trained = (D as f32).sqrt() / mean;
    let sae = world.sae("scaled", json!({"apply_b_dec_to_input": true}));
    // The SAE is right for h / trained · trained: give it states in units 20 times larger.
    let far = world.hidden_file("far.safetensors", trained / 20.0);
    let report = report_of(&sae, &far, Value::Null, None);
    assert!(flags(&report).contains(&"missing_scale"), "{report:#}");
    let needs = json!({"normalize_activations": "expected_average_only_in"});
    let error = Sae::open(world.sae("needs", needs), &SaeOptions::default()).err().unwrap();
    assert_eq!(error.status, Status::RecipeIncomplete, "a known need is never ignored: {error}");
    let needs = json!({"normalize_activations": "expected_average_only_in", "input_scale": 9.0});
    let right = world.hidden_file("right.safetensors", 1.0);
    let report = report_of(&sae, &right, needs, None);
    assert!(flags(&report).contains(&"scale_applied_twice"), "{report:#}");
}

#[test]
fn b_dec_that_is_forgotten_or_subtracted_wrongly_is_flagged() {
    let mut world = World::new(&mut Rng::fresh());
    // Large enough to matter for which latents win.
    let shift: Vec<f32> = world.offset.iter().map(|x| 5.0 * x).collect();
    world.offset.iter_mut().zip(&shift).for_each(|(o, s)| *o += s);
    for x in world.hidden.chunks_exact_mut(D) {
        x.iter_mut().zip(&shift).for_each(|(x, s)| *x += s);
    }
    let hidden = world.hidden_file("h.safetensors", 1.0);
    let report = report_of(
        &world.sae("a", json!({})),
        &hidden,
        json!({"apply_b_dec_to_input": false}),
        None,
    );
    assert!(flags(&report).contains(&"b_dec_forgotten"), "{report:#}");
    // An encoder that has it in its bias already.
    let folder = world.sae("folded", json!({"apply_b_dec_to_input": false}));
    let bias: Vec<f32> = world
        .features
        .chunks(D)
        .map(|row| -row.iter().zip(&world.offset).map(|(w, o)| w * o).sum::<f32>())
        .collect();
    rewrite(&folder, "b_enc", vec![F], bias);
    let report = report_of(&folder, &hidden, Value::Null, None);
    assert_eq!(flags(&report), Vec::<&str>::new(), "{report:#}");
    let report = report_of(&folder, &hidden, json!({"apply_b_dec_to_input": true}), None);
    assert!(flags(&report).contains(&"b_dec_subtracted_wrongly"), "{report:#}");
}

/// Replaces a tensor of a SAELens folder.
fn rewrite(folder: &Path, name: &str, shape: Vec<usize>, values: Vec<f32>) {
    let path = folder.join("sae_weights.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats =
        |data: &[u8]| data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let mut tensors: Vec<(String, Vec<usize>, Vec<f32>)> = file
        .tensors()
        .into_iter()
        .filter(|(other, _)| other != name)
        .map(|(name, view)| (name, view.shape().to_vec(), floats(view.data())))
        .collect();
    tensors.push((name.to_string(), shape, values));
    let named: Vec<Named<'_>> =
        tensors.iter().map(|(n, s, v)| (n.as_str(), s.clone(), v.clone())).collect();
    write(&path, &named, None);
}

/// Thresholds for pre-activations times the decoder's norms, read as plain ones.
#[test]
fn a_missing_decoder_norm_fold_is_flagged() {
    let world = World::new(&mut Rng::fresh());
    let hidden = world.hidden_file("h.safetensors", 1.0);
    let folder = world.sae("jump", json!({"architecture": "jumprelu"}));
    // The encoder's rows are longer and the decoder's shorter by the same, far from 1.
    let norms: Vec<f32> = world.norms.iter().map(|n| 8.0 * n).collect();
    let by = |f: &dyn Fn(usize) -> f32| -> Vec<f32> {
        (0..F)
            .flat_map(|j| world.features[j * D..][..D].iter().map(move |w| (j, w)))
            .map(|(j, w)| w * f(j))
            .collect()
    };
    let rows = by(&|j| norms[j]);
    let turned =
        (0..D).flat_map(|i| (0..F).map(move |j| (i, j))).map(|(i, j)| rows[j * D + i]).collect();
    rewrite(&folder, "W_enc", vec![D, F], turned);
    rewrite(&folder, "W_dec", vec![F, D], by(&|j| 1.0 / norms[j]));
    let report = report_of(&folder, &hidden, Value::Null, None);
    assert!(flags(&report).contains(&"threshold_on_decoder_norm"), "{report:#}");
}

#[test]
fn an_off_by_one_layer_is_flagged_where_its_neighbours_are_given() {
    let mut rng = Rng::fresh();
    let world = World::new(&mut rng);
    let sae = world.sae("layers", json!({}));
    let path = world.folder.path().join("layers.safetensors");
    // Each block adds something that this SAE does not know.
    let shape = vec![SEQUENCES, LENGTH, D];
    let moved: Vec<f32> = world.hidden.iter().map(|x| x + 0.8 * rng.normal()).collect();
    let further: Vec<f32> = moved.iter().map(|x| x + 0.8 * rng.normal()).collect();
    let neighbours = ["hidden_states.3", "hidden_states.4", "hidden_states.5"];
    let one_off = ["hidden_states.4", "hidden_states.5", "hidden_states.6"];
    for (right, names) in [(true, neighbours), (false, one_off)] {
        let order = [&moved, &world.hidden, &further];
        let tensors: Vec<Named<'_>> =
            names.iter().zip(order).map(|(n, v)| (*n, shape.clone(), v.clone())).collect();
        write(&path, &tensors, None);
        let report = report_of(&sae, &path, Value::Null, None);
        assert_eq!(flags(&report).contains(&"wrong_layer"), !right, "{report:#}");
    }
}

/// `hidden_states` hold block boundaries: at another site none of them is what the SAE reads.
#[test]
fn other_sites_are_named_and_are_not_looked_for_in_hidden_states() {
    let world = World::new(&mut Rng::fresh());
    let metadata =
        |hook: &str| json!({"metadata": {"sae_lens_version": "6.54.12", "hook_name": hook}});
    let path = world.folder.path().join("sites.safetensors");
    let shape = vec![SEQUENCES, LENGTH, D];
    let noise: Vec<f32> = world.hidden.iter().rev().copied().collect();
    for (hook, site, layer, tried) in [
        ("blocks.3.hook_resid_post", "block_output", json!(3), true),
        ("blocks.3.hook_mlp_out", "mlp_output", json!(3), false),
        ("blocks.3.attn.hook_z", "attention_z", json!(3), false),
        ("blocks.3.hook_mine", "unknown", Value::Null, false),
    ] {
        let sae = world.sae(hook, metadata(hook));
        // The SAE explains what lies at hidden_states.7 and nothing of `hidden`.
        let tensors = [
            ("hidden", shape.clone(), noise.clone()),
            ("hidden_states.7", shape.clone(), world.hidden.clone()),
        ];
        write(&path, &tensors, None);
        let report = report_of(&sae, &path, Value::Null, None);
        assert_eq!((&report["site"], &report["layer"]), (&json!(site), &layer), "{hook}");
        assert_eq!(flags(&report).contains(&"wrong_layer"), tried, "{hook}: {report:#}");
        write(&path, &tensors[1..], None);
        let sae = Sae::open(&sae, &SaeOptions::default()).unwrap();
        let error = verify(&sae, &path, &VerifyOptions::default(), &mut |_, _| {}).err().unwrap();
        assert_eq!(error.status, Status::TensorMissing, "{hook}: {error}");
        assert_eq!(error.message.contains(site), !tried, "{hook}: {error}");
    }
}

#[test]
fn weights_that_lie_the_other_way_cannot_be_read() {
    let world = World::new(&mut Rng::fresh());
    let folder = world.sae("turned", json!({}));
    rewrite(&folder, "W_enc", vec![F, D], world.features.clone());
    let error = Sae::open(&folder, &SaeOptions::default()).err().unwrap();
    assert_eq!(error.status, Status::Format, "{error}");
}

#[test]
fn inputs_that_do_not_fit_are_refused() {
    let world = World::new(&mut Rng::fresh());
    let sae = Sae::open(world.sae("a", json!({})), &SaeOptions::default()).unwrap();
    let path = world.folder.path().join("bad.safetensors");
    let fails = |sae: &Sae, tensors: &[Named<'_>], status: Status, word: &str| {
        write(&path, tensors, None);
        let error = verify(sae, &path, &VerifyOptions::default(), &mut |_, _| {}).unwrap_err();
        assert_eq!(error.status, status, "{error}");
        assert!(error.message.contains(word), "no {word:?} in: {error}");
    };
    let rows = |n: usize| vec![0.5f32; n];
    fails(&sae, &[("x", vec![2, D], rows(2 * D))], Status::TensorMissing, "hidden_states.4");
    fails(&sae, &[("hidden", vec![2, D + 1], rows(2 * D + 2))], Status::Format, "[T, 128]");
    let hidden = || ("hidden", vec![2, D], rows(2 * D));
    fails(&sae, &[hidden(), ("mask", vec![3], rows(3))], Status::Format, "mask");
    fails(&sae, &[hidden(), ("mask", vec![2], vec![0.0; 2])], Status::Format, "no token");
    let both = ("hidden_states.4", vec![2, D], rows(2 * D));
    fails(&sae, &[hidden(), both], Status::Format, "keep one");
    let part = world.folder.path().join("part.safetensors");
    sae.convert(Some(&[1, 2]), &part, &mut |_, _| {}).unwrap();
    let part = Sae::open(&part, &SaeOptions::default()).unwrap();
    fails(&part, &[hidden()], Status::Unsupported, "partial");
}

/// L0 on every owner's files is that of the owner's own latents.
#[test]
fn l0_is_that_of_the_owners_latents() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/formats");
    let mut compared = 0;
    for entry in fs::read_dir(root).unwrap() {
        let folder = entry.unwrap().path();
        let note: Value =
            serde_json::from_slice(&fs::read(folder.join("note.json")).unwrap()).unwrap();
        let path = folder.join(note["path"].as_str().unwrap());
        let Ok(sae) = Sae::open(path, &SaeOptions::default()) else { continue };
        let bytes = fs::read(folder.join("expected.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let (x, z) = (file.tensor("x").unwrap(), file.tensor("z").unwrap());
        let values: Vec<f32> =
            x.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let hidden = tempfile::NamedTempFile::new().unwrap();
        write(hidden.path(), &[("hidden", x.shape().to_vec(), values)], None);
        let on = z.data().as_chunks::<8>().0.iter().filter(|b| f64::from_le_bytes(**b) != 0.0);
        let expected = on.count() as f64 / z.shape()[0] as f64;
        let report =
            verify(&sae, hidden.path(), &VerifyOptions::default(), &mut |_, _| {}).unwrap();
        let found = number(&report["with_first_token"]["mean_l0"]);
        assert!((found - expected).abs() < 1e-9, "{}: {found} {expected}", folder.display());
        compared += 1;
    }
    assert!(compared >= 40, "only {compared} fixtures");
}
