//! Opening SAEs: values against the owner's library, and what damaged or incomplete files get.
//!
//! The fixtures in tests/data/sae and the values beside them are made by the real sae-lens
//! (tests/make_sae_fixtures.py).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use blockem::error::{Error, Result, Status};
use blockem::sae::{Architecture, EncoderRows, Layout, Recipe, Sae, SaeOptions, SaeTensors, Site};
use blockem::tensor::Tensor;
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

mod values {
    use super::*;

    /// Every fixture, all latents, against what sae-lens computes in f64 from the same file.
    #[test]
    fn equal_the_owners() {
        let mut seen = 0;
        for entry in fs::read_dir(fixtures()).unwrap() {
            let folder = entry.unwrap().path();
            let sae = Sae::open(&folder, &SaeOptions::default()).unwrap();
            check_values(&folder, &sae);
            seen += 1;
        }
        assert!(seen >= 21, "only {seen} fixtures");
    }

    #[test]
    fn do_not_depend_on_the_other_latents() {
        for name in ["jumprelu", "gated", "topk_rescaled", "standard_scaled"] {
            let sae = open(name).unwrap();
            let all = gather_all(&sae);
            let ids = [7, 0, 39, 8, 7, 21];
            let some = sae.gather(&ids).unwrap();
            for (k, id) in ids.iter().enumerate() {
                let one = sae.gather(&[*id]).unwrap();
                let (id, d) = (*id as usize, all.d_in);
                assert_eq!(some.weight[k * d..][..d], all.weight[id * d..][..d], "{name}");
                assert_eq!(one.weight, all.weight[id * d..][..d], "{name}");
                assert_eq!(some.bias[k], all.bias[id], "{name}");
                assert_eq!(one.bias[0], all.bias[id], "{name}");
            }
        }
    }

    #[test]
    fn of_no_latents_are_empty() {
        let rows = open("jumprelu").unwrap().gather(&[]).unwrap();
        assert!(rows.weight.is_empty() && rows.bias.is_empty());
    }

    /// One fixture as a bare file, either way round, its keys flat, nested, or in the options.
    #[test]
    fn of_a_bare_file_are_those_of_the_folder() {
        let folder = fixtures().join("jumprelu");
        let whole = gather_all(&open("jumprelu").unwrap());
        let cfg = config(&folder);
        let flat: HashMap<String, String> = cfg
            .iter()
            .map(|(k, v)| (k.clone(), v.as_str().map_or(v.to_string(), str::to_string)))
            .collect();
        let nested = HashMap::from([("cfg".to_string(), Value::Object(cfg.clone()).to_string())]);
        let python: HashMap<String, String> = [
            ("architecture", "jumprelu"),
            ("apply_b_dec_to_input", "False"),
            ("normalize_activations", "None"),
            ("d_in", "24"),
        ]
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .into();
        let given = SaeOptions { recipe: Some(cfg), ..SaeOptions::default() };
        let temp = TempDir::new().unwrap();
        let path = temp.path().join("bare.safetensors");
        for turned in [false, true] {
            for (metadata, options) in [
                (Some(flat.clone()), SaeOptions::default()),
                (Some(nested.clone()), SaeOptions::default()),
                (Some(python.clone()), SaeOptions::default()),
                (None, given.clone()),
            ] {
                let mut file = Tensors::read(&folder.join("sae_weights.safetensors"));
                if turned {
                    file.transpose("W_enc");
                }
                file.metadata = metadata;
                file.write(&path);
                let sae = Sae::open(&path, &options).unwrap();
                assert_eq!(gather_all(&sae), whole);
                assert_eq!(sae.recipe().format, "safetensors");
            }
        }
    }

    /// SAELens subtracts b_dec where the key is absent; others of the same tensors do not.
    #[test]
    fn of_a_bare_jumprelu_file_need_the_rule_of_b_dec() {
        let folder = fixtures().join("jumprelu_b_dec");
        let temp = TempDir::new().unwrap();
        let path = temp.path().join("bare.safetensors");
        let mut file = Tensors::read(&folder.join("sae_weights.safetensors"));
        file.metadata = Some(HashMap::from([("architecture".into(), "jumprelu".into())]));
        file.write(&path);
        let error = Sae::open(&path, &SaeOptions::default()).err().unwrap();
        assert_eq!(error.status, Status::RecipeIncomplete, "{error}");
        assert!(error.message.contains("apply_b_dec_to_input"), "{error}");
        for stated in [false, true] {
            let recipe = json!({ "apply_b_dec_to_input": stated }).as_object().cloned();
            let sae = Sae::open(&path, &SaeOptions { recipe, input_scale: None }).unwrap();
            assert_eq!(sae.recipe().b_dec_subtracted, stated);
        }
    }

    #[test]
    fn of_arrays_are_those_of_the_file() {
        for name in ["jumprelu", "gated", "topk_scaled", "standard_plain", "jumprelu_float64"] {
            let folder = fixtures().join(name);
            let sae = open(name).unwrap();
            let mut file = Tensors::read(&folder.join("sae_weights.safetensors"));
            for turned in [false, true] {
                if turned {
                    file.transpose("W_enc");
                }
                let adopted = Sae::from_tensors(&described(&file, sae.recipe())).unwrap();
                assert_eq!(gather_all(&adopted), gather_all(&sae), "{name}");
            }
        }
    }

    #[test]
    fn of_strided_arrays_are_those_of_packed_ones() {
        let (d, f) = (5, 9);
        let weight: Vec<f32> = (0..2 * d * f).map(|i| (i as f32).sin()).collect();
        let bias: Vec<f32> = (0..3 * f).map(|i| i as f32).collect();
        // SAFETY: rows of 2d elements, of which every second is taken; every third bias.
        let (strided, b_enc) = unsafe {
            let data = weight.as_ptr().cast();
            let cpu = blockem::tensor::Device::Cpu;
            let f32 = blockem::tensor::DType::F32;
            (
                Tensor::from_raw(data, f32, cpu, &[f, d], &[2 * d, 2]).unwrap(),
                Tensor::from_raw(bias.as_ptr().cast(), f32, cpu, &[f], &[3]).unwrap(),
            )
        };
        let mut tensors = SaeTensors::new(Architecture::Standard, d, f, strided);
        tensors.encoder_bias = Some(b_enc);
        let rows = gather_all(&Sae::from_tensors(&tensors).unwrap());
        let expected: Vec<f32> = weight.iter().copied().step_by(2).collect();
        assert_eq!(rows.weight, expected);
        assert_eq!(rows.bias, bias.iter().copied().step_by(3).collect::<Vec<_>>());
    }

    fn check_values(folder: &Path, sae: &Sae) {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let expected = Tensors::read(&folder.join("expected.safetensors"));
        let x = expected.numbers("x");
        let z = expected.numbers("z");
        let recipe = sae.recipe();
        let ours = evaluate(recipe, &gather_all(sae), &x);
        assert_eq!(ours.len(), z.len(), "{name}");
        let largest = z.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for (i, (a, b)) in ours.iter().zip(&z).enumerate() {
            // The only error is the rounding of folded rows to f32.
            let bound = 4.0 * f32::EPSILON as f64 * largest.max(1.0);
            assert!((a - b).abs() <= bound, "{name}: z[{i}] is {a}, sae-lens says {b}");
        }
    }

    /// The internal form in f64, all latents of every token.
    fn evaluate(recipe: &Recipe, rows: &EncoderRows, x: &[f64]) -> Vec<f64> {
        let mut z = Vec::new();
        for h in x.chunks_exact(rows.d_in) {
            let dot = |k: usize| -> f64 {
                let row = &rows.weight[k * rows.d_in..][..rows.d_in];
                row.iter().zip(h).map(|(w, h)| *w as f64 * h).sum()
            };
            let mut token: Vec<f64> = (0..rows.bias.len())
                .map(|k| match (&rows.gate, &rows.threshold) {
                    (Some(gate), _) if dot(k) + gate.bias[k] as f64 <= 0.0 => 0.0,
                    (Some(gate), _) => {
                        (gate.scale[k] as f64 * dot(k) + rows.bias[k] as f64).max(0.0)
                    }
                    (None, threshold) => {
                        let u = dot(k) + rows.bias[k] as f64;
                        let least = threshold.as_ref().map_or(0.0, |t| t[k] as f64);
                        if u <= least { 0.0 } else { u }
                    }
                })
                .collect();
            if let Some(k) = recipe.k {
                let mut order: Vec<usize> = (0..token.len()).collect();
                order.sort_by(|a, b| token[*b].total_cmp(&token[*a]));
                order[k..].iter().for_each(|i| token[*i] = 0.0);
            }
            z.extend(token);
        }
        z
    }
}

mod recipe {
    use super::*;

    #[test]
    fn says_what_changes_a_latent() {
        let value = open("jumprelu").unwrap().describe().unwrap();
        let expected = [
            ("format", json!("saelens")),
            ("architecture", json!("jumprelu")),
            ("d_in", json!(24)),
            ("d_sae", json!(64)),
            ("k", Value::Null),
            ("dtype", json!("float32")),
            ("b_dec_subtracted", json!(false)),
            ("normalization", json!("none")),
            ("scale", json!(1.0)),
            ("hook", json!("blocks.19.hook_resid_post")),
            ("layer", json!(19)),
            ("hidden_states_index", json!(20)),
            ("model", json!("tiny-llama")),
            ("stored_latents", Value::Null),
        ];
        for (key, expected) in expected {
            assert_eq!(value[key], expected, "{key}");
        }
        let threshold = &value["threshold"];
        let edges = ["min", "median", "max"].map(|k| threshold[k].as_f64().unwrap());
        assert!(edges[0] < 0.0 && edges[0] < edges[1] && edges[1] < edges[2], "{edges:?}");
    }

    #[test]
    fn places_the_hook() {
        let place = |name| {
            let value = open(name).unwrap().describe().unwrap();
            (value["layer"].clone(), value["hidden_states_index"].clone())
        };
        assert_eq!(place("standard"), (json!(19), json!(20)));
        assert_eq!(place("standard_plain"), (json!(3), json!(4)));
        assert_eq!(place("jumprelu_b_dec"), (json!(2), Value::Null));
        assert_eq!(place("batchtopk"), (Value::Null, Value::Null));
    }

    /// SAELens reads where hook_name says; hook_layer only ends its pass.
    #[test]
    fn keys_of_saelens_place_the_site_together() {
        let told = |keys: Value| {
            let case = Case::of("standard");
            case.edit_config(|cfg| {
                cfg.remove("hook_name");
                if let Some(metadata) = cfg.get_mut("metadata").and_then(Value::as_object_mut) {
                    metadata.remove("hook_name");
                }
                cfg.extend(keys.as_object().unwrap().clone());
            });
            let sae = Sae::open(case.folder(), &SaeOptions::default());
            sae.map(|sae| (sae.recipe().site, sae.recipe().layer, sae.recipe().hook.clone()))
        };
        let hook = |name: &str| Some(name.to_string());
        let exact = "model.layers.5.pre_feedforward_layernorm.output";
        for (keys, site, layer, name) in [
            (json!({}), Site::Unknown, None, None),
            (json!({"hook_layer": 5}), Site::Unknown, Some(5), None),
            (
                json!({"hook_name": "blocks.5.hook_mine", "hook_layer": 5}),
                Site::Unknown,
                Some(5),
                hook("blocks.5.hook_mine"),
            ),
            (
                json!({"hook_point": "blocks.5.hook_resid_pre", "hook_point_layer": 5}),
                Site::BlockOutput,
                Some(4),
                hook("blocks.5.hook_resid_pre"),
            ),
            // What sae-lens 6.54.12 writes for a transcoder of Gemma Scope 2.
            (
                json!({"hook_name": "blocks.5.hook_mlp_in", "hf_hook_name": exact}),
                Site::MlpInput,
                Some(5),
                hook(exact),
            ),
            (
                json!({"hook_name": "blocks.5.hook_resid_post", "hf_hook_name": "model.layers.5"}),
                Site::BlockOutput,
                Some(5),
                hook("blocks.5.hook_resid_post"),
            ),
            (
                json!({"hook_point": "blocks.5.attn.hook_z", "hook_point_head_index": 3}),
                Site::Unknown,
                Some(5),
                hook("blocks.5.attn.hook_z"),
            ),
            (
                json!({"hook_name": "blocks.5.attn.hook_z", "hook_head_index": 3}),
                Site::Unknown,
                Some(5),
                hook("blocks.5.attn.hook_z"),
            ),
        ] {
            assert_eq!(told(keys.clone()).unwrap(), (site, layer, name), "{keys}");
        }
        for (keys, word) in [
            (json!({"hook_name": "blocks.5.hook_resid_post", "hook_layer": 7}), "hook_layer is 7"),
            (
                json!({"hook_name": "blocks.5.hook_mlp_in", "hf_hook_name": "model.layers.7"}),
                "hf_hook_name is model.layers.7",
            ),
        ] {
            let error = told(keys.clone()).err().unwrap_or_else(|| panic!("{keys}"));
            assert_eq!(error.status, Status::Format, "{error}");
            for word in ["cfg.json", word, "blocks.5"] {
                assert!(error.message.contains(word), "no {word:?} in: {error}");
            }
        }
        // The remedy that the error names.
        let case = Case::of("standard");
        case.edit_config(|cfg| drop(cfg.insert("hook_layer".into(), json!(7))));
        case.fails(Status::Format, &["hook_layer is 7", "hook_name in the options' recipe"]);
        let recipe = json!({"hook_name": "blocks.7.hook_resid_post"}).as_object().cloned();
        let options = SaeOptions { recipe, ..SaeOptions::default() };
        assert_eq!(Sae::open(case.folder(), &options).unwrap().recipe().layer, Some(7));
    }

    #[test]
    fn follows_old_configurations() {
        let recipe = |name| open(name).unwrap().recipe().clone();
        let old = recipe("old_standard");
        assert_eq!(old.architecture, Architecture::Standard);
        assert!(old.b_dec_subtracted, "true where the key is absent");
        assert_eq!(old.hook.as_deref(), Some("blocks.19.hook_resid_post"));
        let topk = recipe("old_topk");
        assert_eq!((topk.architecture, topk.k), (Architecture::TopK, Some(6)));
        let scaled = recipe("old_scaled");
        assert_eq!(
            (scaled.normalization.as_str(), scaled.scale),
            ("expected_average_only_in", 2.5)
        );
        assert_eq!(recipe("batchtopk").architecture, Architecture::JumpRelu);
        assert_eq!(recipe("jumprelu_bfloat16").dtype.name(), "bfloat16");
    }

    #[test]
    fn is_the_same_from_the_folder_and_from_its_files() {
        let folder = fixtures().join("gated");
        let sae = Sae::open(&folder, &SaeOptions::default()).unwrap();
        for file in ["cfg.json", "sae_weights.safetensors"] {
            let other = Sae::open(folder.join(file), &SaeOptions::default()).unwrap();
            assert_eq!(other.recipe(), sae.recipe());
        }
    }

    #[test]
    fn the_scale_can_be_given() {
        let case = Case::of("standard_scaled");
        fs::remove_file(case.path("activation_scaler.json")).unwrap();
        let error = case.error();
        assert_eq!(error.status, Status::RecipeIncomplete);
        for word in ["cfg.json", "normalize_activations", "activation_scaler.json", "input-scale"] {
            assert!(error.message.contains(word), "{error}");
        }
        let options = SaeOptions { input_scale: Some(0.37), ..SaeOptions::default() };
        let given = Sae::open(case.folder(), &options).unwrap();
        assert_eq!(gather_all(&given), gather_all(&open("standard_scaled").unwrap()));

        case.write("activation_scaler.json", r#"{"scaling_factor": null}"#);
        case.fails(Status::RecipeIncomplete, &["scale"]);
        case.write("activation_scaler.json", r#"{"scaling_factor": -1.5}"#);
        case.fails(Status::Format, &["activation_scaler.json", "scaling_factor", "-1.5"]);

        // A scale for a file that carries it already would count twice.
        let error = Sae::open(fixtures().join("standard"), &options).err().unwrap();
        assert_eq!(error.status, Status::InvalidArgument);
    }

    #[test]
    fn options_override_the_file() {
        let recipe = json!({ "architecture": "standard", "apply_b_dec_to_input": false });
        let options = SaeOptions { recipe: recipe.as_object().cloned(), ..SaeOptions::default() };
        let sae = Sae::open(fixtures().join("old_topk"), &options).unwrap();
        assert_eq!(sae.recipe().architecture, Architecture::Standard);
        assert!(!sae.recipe().b_dec_subtracted);
    }

    /// Which configurations read hidden states without their mean over d.
    #[test]
    fn tells_what_transformer_lens_made_of_the_hidden_states() {
        let kwargs = |json: Value| json!({"model_from_pretrained_kwargs": json});
        let centered = || kwargs(json!({"center_writing_weights": true}));
        let at = |hook: &str, mut keys: Value| {
            keys["hook_name"] = json!(hook);
            keys
        };
        let resid = "blocks.3.hook_resid_pre";
        let cases = [
            (at(resid, json!({})), Ok(false)),
            (at(resid, kwargs(json!({}))), Ok(false)),
            (at(resid, kwargs(json!({"center_writing_weights": false}))), Ok(false)),
            (at(resid, centered()), Ok(true)),
            (at("blocks.3.hook_attn_out", centered()), Ok(true)),
            (at("blocks.3.attn.hook_z", centered()), Ok(false)),
            (at("blocks.3.mlp.hook_post", centered()), Ok(false)),
            (at("blocks.3.somewhere", centered()), Err("center_input")),
            (at(resid, json!({"metadata": centered()})), Ok(true)),
            (at(resid, kwargs(json!({"center_writing_weights": "yes"}))), Err("writing_weights")),
            (at(resid, kwargs(json!({"fold_value_biases": true}))), Ok(false)),
            (
                at("blocks.3.attn.hook_z", kwargs(json!({"fold_value_biases": true}))),
                Err("fold_value_biases"),
            ),
            (at("blocks.3.mlp.hook_in", kwargs(json!({"fold_ln": true}))), Err("fold_ln")),
            (at(resid, json!({"center_input": true})), Ok(true)),
        ];
        for (keys, expected) in cases {
            let case = Case::of("standard");
            case.edit_config(|cfg| {
                cfg.insert("model_name".into(), json!("gpt2-small"));
                cfg.extend(keys.as_object().unwrap().clone());
            });
            match (Sae::open(case.folder(), &SaeOptions::default()), expected) {
                (Ok(sae), Ok(expected)) => {
                    assert_eq!(sae.recipe().center_input, expected, "{keys}");
                    assert_eq!(sae.describe().unwrap()["center_input"], expected, "{keys}");
                }
                (Err(error), Err(key)) => assert!(error.message.contains(key), "{keys}: {error}"),
                (Ok(_), Err(_)) => panic!("{keys} is read"),
                (Err(error), Ok(_)) => panic!("{keys}: {error}"),
            }
        }
        // Models with RMSNorm are not centred, whatever was asked for; layer norm centres by itself.
        for (key, value) in [("model_name", "gemma-2b"), ("normalize_activations", "layer_norm")] {
            let case = Case::of("standard");
            case.edit_config(|cfg| {
                cfg.insert("model_name".into(), json!("gpt2-small"));
                cfg.extend(at(resid, centered()).as_object().unwrap().clone());
                cfg.insert(key.into(), json!(value));
            });
            let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
            assert!(!sae.recipe().center_input, "{key} {value}");
        }
    }

    /// SAELens before version 3 centred what models with LayerNorm give, and says nothing of it.
    #[test]
    fn early_files_of_layer_norm_models_must_state_centring() {
        let case = Case::of("standard");
        let mut early = config(case.folder());
        early.retain(|key, _| !matches!(&key[..], "metadata" | "sae_lens_version"));
        early.insert("hook_point".into(), json!("blocks.8.hook_resid_pre"));
        early.insert("model_name".into(), json!("gpt2-small"));
        early.shift_remove("hook_name");
        case.write("cfg.json", &Value::Object(early.clone()).to_string());
        case.fails(
            Status::RecipeIncomplete,
            &["cfg.json", "key center_input", "gpt2-small-res-jb"],
        );
        for stated in [false, true] {
            let recipe = json!({ "center_input": stated }).as_object().cloned();
            let sae = Sae::open(case.folder(), &SaeOptions { recipe, input_scale: None }).unwrap();
            assert_eq!(sae.recipe().center_input, stated);
        }
        // SAELens' own index tells it of three repositories.
        let cached = case.path("models--jbloom--GPT2-Small-SAEs-Reformatted/snapshots/0a/blocks.8");
        fs::create_dir_all(&cached).unwrap();
        for name in ["cfg.json", "sae_weights.safetensors"] {
            fs::copy(case.path(name), cached.join(name)).unwrap();
        }
        assert!(Sae::open(&cached, &SaeOptions::default()).unwrap().recipe().center_input);
    }

    /// W · (h − mean(h)) by rows without their mean; the other arrays stay.
    #[test]
    fn centred_rows_are_rows_less_their_mean() {
        let read = |center: bool| {
            let recipe = json!({ "center_input": center }).as_object().cloned();
            let options = SaeOptions { recipe, input_scale: None };
            Sae::open(fixtures().join("gated_scaled"), &options).unwrap()
        };
        let (plain, centered) = (read(false), read(true));
        let (p, c) = (gather_all(&plain), gather_all(&centered));
        assert_eq!((&p.bias, &p.gate, &p.threshold), (&c.bias, &c.gate, &c.threshold));
        for (p, c) in p.weight.chunks(p.d_in).zip(c.weight.chunks(c.d_in)) {
            let mean = p.iter().map(|w| *w as f64).sum::<f64>() / p.len() as f64;
            let largest = p.iter().fold(0.0f32, |m, w| m.max(w.abs())) as f64;
            assert!(mean.abs() > 1e-4, "a row without a mean shows nothing");
            for (p, c) in p.iter().zip(c) {
                assert!(
                    (*p as f64 - mean - *c as f64).abs() <= 2.0 * f32::EPSILON as f64 * largest
                );
            }
        }
        let temp = TempDir::new().unwrap();
        let out = temp.path().join("out.safetensors");
        centered.convert(None, &out, &mut |_, _| {}).unwrap();
        let again = Sae::open(&out, &SaeOptions::default()).unwrap();
        assert_eq!(gather_all(&again), c);
        assert!(again.recipe().center_input);
    }

    #[test]
    fn the_file_has_a_sha256() {
        let folder = fixtures().join("standard");
        let mut last = (0, 0);
        let sae = Sae::open(&folder, &SaeOptions::default()).unwrap();
        let digest = sae.file_sha256(&mut |done, all| last = (done, all)).unwrap();
        let bytes = fs::read(folder.join("sae_weights.safetensors")).unwrap();
        use sha2::Digest;
        let expected: String =
            sha2::Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digest, expected);
        assert_eq!(last, (bytes.len() as u64, bytes.len() as u64));
    }
}

mod incomplete {
    use super::*;

    #[test]
    fn files_are_named() {
        let case = Case::of("standard");
        fs::remove_file(case.path("sae_weights.safetensors")).unwrap();
        case.fails(Status::Io, &["sae_weights.safetensors", "cfg.json"]);
        fs::remove_file(case.path("cfg.json")).unwrap();
        case.fails(Status::Format, &["no known format", "expected.safetensors"]);
        let gone = case.path("gone.safetensors");
        let error = Sae::open(&gone, &SaeOptions::default()).err().unwrap();
        assert_eq!(error.status, Status::Io);
        assert!(error.message.contains("gone.safetensors"), "{error}");
    }

    #[test]
    fn tensors_are_named() {
        let needed = [
            ("standard", &["W_enc", "b_enc", "b_dec"][..]),
            ("jumprelu", &["W_enc", "b_enc", "threshold"]),
            ("gated", &["W_enc", "b_gate", "b_mag", "r_mag", "b_dec"]),
            ("topk_rescaled", &["W_enc", "b_enc", "W_dec"]),
        ];
        for (name, tensors) in needed {
            for tensor in tensors {
                let case = Case::of(name);
                case.edit(|file| drop(file.tensors.remove(*tensor).unwrap()));
                case.fails(Status::TensorMissing, &["sae_weights.safetensors", tensor, "holds"]);
            }
        }
    }

    #[test]
    fn keys_are_named() {
        let case = Case::of("topk");
        case.edit_config(|cfg| drop(cfg.remove("k")));
        case.fails(Status::RecipeIncomplete, &["cfg.json", "key k"]);
        let case = Case::of("topk");
        case.edit_config(|cfg| drop(cfg.remove("architecture")));
        case.fails(Status::RecipeIncomplete, &["cfg.json", "key architecture"]);
        let case = Case::of("old_topk");
        case.edit_config(|cfg| drop(cfg.remove("activation_fn_kwargs")));
        case.fails(Status::RecipeIncomplete, &["cfg.json", "key k"]);
    }

    #[test]
    fn bare_files_need_a_recipe() {
        let temp = TempDir::new().unwrap();
        let path = temp.path().join("bare.safetensors");
        let mut file = Tensors::read(&fixtures().join("standard/sae_weights.safetensors"));
        file.metadata = None;
        file.write(&path);
        let error = Sae::open(&path, &SaeOptions::default()).err().unwrap();
        assert_eq!(error.status, Status::RecipeIncomplete);
        assert!(error.message.contains("architecture"), "{error}");

        let mut square = Tensors::read(&fixtures().join("standard_square/sae_weights.safetensors"));
        let mut metadata = HashMap::from([("architecture".to_string(), "standard".to_string())]);
        square.metadata = Some(metadata.clone());
        square.write(&path);
        let error = Sae::open(&path, &SaeOptions::default()).err().unwrap();
        assert_eq!(error.status, Status::RecipeIncomplete);
        assert!(error.message.contains("layout"), "{error}");

        metadata.insert("layout".to_string(), "input_major".to_string());
        square.metadata = Some(metadata);
        square.write(&path);
        let sae = Sae::open(&path, &SaeOptions::default()).unwrap();
        assert_eq!(gather_all(&sae), gather_all(&open("standard_square").unwrap()));
    }
}

mod wrong {
    use super::*;

    #[test]
    fn configurations_are_refused() {
        let set = |key: &'static str, value: Value| {
            move |cfg: &mut Map<String, Value>| drop(cfg.insert(key.to_string(), value.clone()))
        };
        let cases: [(Status, &str, Value); 14] = [
            (Status::Unsupported, "architecture", json!("matching_pursuit")),
            (Status::Unsupported, "architecture", json!("temporal")),
            (Status::Unsupported, "architecture", json!("of tomorrow")),
            (Status::Format, "model_from_pretrained_kwargs", json!(true)),
            (Status::Format, "architecture", json!(7)),
            (Status::Format, "architecture", json!("jumprelu")),
            (Status::Unsupported, "normalize_activations", json!("covariance_whitening")),
            (Status::Format, "normalize_activations", json!(3)),
            (Status::Format, "apply_b_dec_to_input", json!("yes")),
            (Status::Format, "d_in", json!(17)),
            (Status::Format, "d_sae", json!(39)),
            (Status::Format, "d_sae", json!(-1)),
            (Status::Format, "sae_lens_version", json!("latest")),
            (Status::Format, "hook_name", json!(["a"])),
        ];
        for (status, key, value) in cases {
            let case = Case::of("standard");
            // A gated file is not jumprelu, whatever the key says.
            let case = if value == json!("jumprelu") { Case::of("gated") } else { case };
            case.edit_config(set(key, value.clone()));
            let error = case.error();
            assert_eq!(error.status, status, "{key} {value}: {error}");
            assert!(error.message.contains(key), "{key} {value}: {error}");
            assert!(error.message.contains("cfg.json"), "{key} {value}: {error}");
        }
        // A transcoder's b_dec is not the input's; a running threshold says for what it is.
        let case = Case::of("standard");
        case.edit_config(set("architecture", json!("skip_transcoder")));
        case.fails(Status::Format, &["cfg.json", "apply_b_dec_to_input", "transcoder"]);
        case.edit_config(set("architecture", json!("batchtopk")));
        case.fails(Status::RecipeIncomplete, &["cfg.json", "rescale_acts_by_decoder_norm"]);
        case.edit_config(set("rescale_acts_by_decoder_norm", json!(true)));
        case.fails(Status::TensorMissing, &["topk_threshold", "holds"]);
        let case = Case::of("jumprelu");
        case.edit(|file| {
            let threshold = file.tensors["threshold"].clone();
            file.tensors.insert("log_threshold".into(), threshold);
        });
        case.fails(Status::Format, &["threshold and log_threshold"]);
        for k in [0, 65] {
            let case = Case::of("topk");
            case.edit_config(set("k", json!(k)));
            case.fails(Status::Format, &["cfg.json", "key k"]);
        }
        let case = Case::of("old_standard");
        case.edit_config(set("activation_fn_str", json!("tanh-relu")));
        case.fails(Status::Unsupported, &["tanh-relu"]);
    }

    #[test]
    fn json_is_located() {
        let case = Case::of("standard");
        case.write("cfg.json", "{\n  \"d_in\": 16,,\n}");
        case.fails(Status::Format, &["cfg.json", "line 2 column 14"]);
        case.write("cfg.json", "[1, 2]");
        case.fails(Status::Format, &["cfg.json", "object"]);
        fs::write(case.path("cfg.json"), b"\xff\xfe{}").unwrap();
        case.fails(Status::Format, &["cfg.json"]);
        case.write("cfg.json", &"[".repeat(100_000));
        case.fails(Status::Format, &["cfg.json"]);
        let text = Value::Object(config(&fixtures().join("standard"))).to_string();
        case.write("cfg.json", &text.replacen('{', "{\"lr\": NaN, ", 1));
        case.fails(Status::Format, &["cfg.json", "the key lr holds NaN"]);
        case.write("cfg.json", &format!("\u{feff}{text}"));
        assert_eq!(
            Sae::open(case.folder(), &SaeOptions::default()).unwrap().recipe(),
            open("standard").unwrap().recipe()
        );
    }

    #[test]
    fn shapes_are_named() {
        let shapes = [
            ("standard", "b_enc", vec![39]),
            ("standard", "b_enc", vec![1, 40]),
            ("standard", "b_dec", vec![15]),
            ("standard", "W_dec", vec![40, 15]),
            ("standard", "W_enc", vec![40, 16]),
            ("standard", "W_enc", vec![640]),
            ("standard", "W_enc", vec![16, 0]),
            ("jumprelu", "threshold", vec![1]),
            ("gated", "r_mag", vec![57]),
        ];
        for (name, tensor, shape) in shapes {
            let case = Case::of(name);
            case.edit(|file| file.reshape(tensor, &shape));
            case.fails(Status::Format, &["sae_weights.safetensors", tensor, "shape"]);
        }
    }

    #[test]
    fn element_types_are_named() {
        for tensor in ["W_enc", "b_enc"] {
            let case = Case::of("standard");
            case.edit(|file| {
                let (_, shape, bytes) = file.tensors.remove(tensor).unwrap();
                let long = [bytes.clone(), bytes].concat();
                file.tensors.insert(tensor.to_string(), (Dtype::I64, shape, long));
            });
            case.fails(Status::Format, &["sae_weights.safetensors", tensor, "int64"]);
        }
        let case = Case::of("standard");
        case.edit(|file| {
            let (_, shape, bytes) = file.tensors.remove("W_enc").unwrap();
            let short = bytes[..bytes.len() / 4].to_vec();
            file.tensors.insert("W_enc".to_string(), (Dtype::F8_E4M3, shape, short));
        });
        case.fails(Status::Format, &["W_enc", "F8_E4M3"]);
    }

    #[test]
    fn damaged_numbers_are_located() {
        let places = [
            ("standard", "W_enc", 40 * 3 + 7, "latent 7, input 3"),
            ("standard", "b_enc", 7, "[7]"),
            ("standard", "b_dec", 2, "[2]"),
            ("jumprelu", "threshold", 7, "[7]"),
            ("gated", "b_gate", 7, "[7]"),
            ("gated", "r_mag", 7, "[7]"),
            ("topk_rescaled", "W_dec", 12 * 7 + 4, "latent 7, input 4"),
        ];
        for (name, tensor, at, place) in places {
            for bad in [f32::NAN, f32::INFINITY] {
                let case = Case::of(name);
                case.edit(|file| file.set(tensor, at, bad));
                let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
                let error = sae.gather(&[3, 7]).err().unwrap();
                assert_eq!(error.status, Status::NonFinite, "{error}");
                for word in [tensor, place, "sae_weights.safetensors"] {
                    assert!(error.message.contains(word), "{error}");
                }
                // Only what is used must be sound, except what every latent uses.
                assert_eq!(sae.gather(&[3]).is_ok(), tensor != "b_dec");
            }
        }
        let case = Case::of("gated");
        case.edit(|file| file.set("r_mag", 0, 200.0));
        let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
        assert_eq!(sae.gather(&[0]).err().unwrap().status, Status::NonFinite);
    }

    #[test]
    fn latents_out_of_range_are_named() {
        let error = open("standard").unwrap().gather(&[0, 40]).err().unwrap();
        assert_eq!(error.status, Status::LatentRange);
        assert!(error.message.contains("40"), "{error}");
    }

    #[test]
    fn finetuning_factors_are_refused_unless_one() {
        for (value, fine) in [(1.0, true), (1.25, false), (f32::NAN, false)] {
            let case = Case::of("old_standard");
            case.edit(|file| {
                let bytes = [value.to_le_bytes(); 40].concat();
                file.tensors.insert("scaling_factor".to_string(), (Dtype::F32, vec![40], bytes));
            });
            match fine {
                true => drop(Sae::open(case.folder(), &SaeOptions::default()).unwrap()),
                false => case.fails(Status::Unsupported, &["scaling_factor"]),
            }
        }
    }

    #[test]
    fn what_only_looks_like_a_checkpoint_is_refused() {
        let temp = TempDir::new().unwrap();
        let path = temp.path().join("ae.pt");
        for (start, status) in [
            (&b"PK\x03\x04\x00\x00\x08\x08\x00\x00"[..], Status::Format),
            (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9", Status::UnsafePickle),
        ] {
            fs::write(&path, [start, &[0; 64]].concat()).unwrap();
            for place in [path.as_path(), temp.path()] {
                let error = Sae::open(place, &SaeOptions::default()).err().unwrap();
                assert_eq!(error.status, status);
                assert!(error.message.contains("ae.pt"), "{error}");
            }
        }
    }

    /// A header of 640 bytes begins like a pickle of protocol 2.
    #[test]
    fn lengths_that_look_like_pickles_are_lengths() {
        let case = Case::of("standard");
        let weights = case.path("sae_weights.safetensors");
        let bytes = fs::read(&weights).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header = bytes[8..8 + length].to_vec();
        assert!(length <= 640);
        header.resize(640, b' ');
        let file = [&640u64.to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
        assert_eq!(file[..2], [0x80, 0x02]);
        fs::write(&weights, file).unwrap();
        Sae::open(case.folder(), &SaeOptions::default()).unwrap();
    }

    #[test]
    fn arrays_are_refused() {
        let (w, b) = ([1.0f32; 12], [0.0f32; 4]);
        let tensor =
            |data: &'static [f32], shape: &[usize]| Tensor::from_slice(data, shape).unwrap();
        let w = tensor(Box::leak(Box::new(w)), &[4, 3]);
        let b = tensor(Box::leak(Box::new(b)), &[4]);
        let good = || {
            let mut tensors = SaeTensors::new(Architecture::Standard, 3, 4, w);
            tensors.encoder_bias = Some(b);
            tensors
        };
        assert!(Sae::from_tensors(&good()).is_ok());
        let status = |change: &dyn Fn(&mut SaeTensors<'static>)| {
            let mut tensors = good();
            change(&mut tensors);
            Sae::from_tensors(&tensors).err().unwrap().status
        };
        assert_eq!(status(&|t| t.encoder_bias = None), Status::TensorMissing);
        assert_eq!(status(&|t| t.architecture = Architecture::JumpRelu), Status::TensorMissing);
        assert_eq!(status(&|t| t.architecture = Architecture::Gated), Status::InvalidArgument);
        assert_eq!(status(&|t| t.k = Some(1)), Status::InvalidArgument);
        assert_eq!(status(&|t| t.architecture = Architecture::TopK), Status::RecipeIncomplete);
        assert_eq!(status(&|t| t.apply_b_dec_to_input = true), Status::TensorMissing);
        assert_eq!(status(&|t| t.rescale_acts_by_decoder_norm = true), Status::TensorMissing);
        assert_eq!(status(&|t| t.input_scale = f64::NAN), Status::InvalidArgument);
        assert_eq!(status(&|t| t.d_in = 4), Status::Shape);
        assert_eq!(status(&|t| t.encoder_layout = Some(Layout::InputMajor)), Status::Shape);
        assert_eq!(status(&|t| t.encoder_bias = Some(tensor(&[0.0; 3], &[3]))), Status::Shape);
        assert_eq!(
            status(&|t| t.encoder_bias = Some(tensor(&[f32::NAN; 4], &[4]))),
            Status::NonFinite
        );
        let long = Tensor::from_slice(&[0i64; 4], &[4]).unwrap();
        assert_eq!(status(&|t| t.encoder_bias = Some(long)), Status::Dtype);
        let square = SaeTensors {
            encoder_bias: Some(tensor(&[0.0; 2], &[2])),
            ..SaeTensors::new(Architecture::Standard, 2, 2, tensor(&[1.0; 4], &[2, 2]))
        };
        assert_eq!(Sae::from_tensors(&square).err().unwrap().status, Status::InvalidArgument);
        let told = SaeTensors { encoder_layout: Some(Layout::InputMajor), ..square };
        assert!(Sae::from_tensors(&told).is_ok());
    }
}

/// Files that were cut, lengthened, or changed on purpose.
mod hostile {
    use super::*;

    #[test]
    fn every_truncation_is_an_error() {
        let case = Case::of("standard");
        let weights = case.path("sae_weights.safetensors");
        let bytes = fs::read(&weights).unwrap();
        for length in 0..bytes.len() {
            fs::write(&weights, &bytes[..length]).unwrap();
            case.fails(Status::Format, &["sae_weights.safetensors"]);
        }
        fs::write(&weights, [&bytes[..], b"x"].concat()).unwrap();
        case.fails(Status::Format, &["foreign"]);
    }

    #[test]
    fn lies_about_sizes_are_errors() {
        let case = Case::of("standard");
        let weights = case.path("sae_weights.safetensors");
        for length in [1 << 63, u64::MAX, u64::MAX - 7, 100_000_001, 50] {
            let bytes = [&u64::to_le_bytes(length)[..], b"{}      "].concat();
            fs::write(&weights, bytes).unwrap();
            case.fails(Status::Format, &["sae_weights.safetensors"]);
        }
        let huge = u64::MAX / 4 + 1;
        let headers = [
            // element count overflows; byte count overflows; shape and offsets disagree
            format!(
                r#"{{"W_enc":{{"dtype":"F32","shape":[{huge},{huge}],"data_offsets":[0,8]}}}}"#
            ),
            format!(r#"{{"W_enc":{{"dtype":"F32","shape":[{huge},1],"data_offsets":[0,8]}}}}"#),
            r#"{"W_enc":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#.to_string(),
            // backwards, with a gap, overlapping, beyond the end
            r#"{"W_enc":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#.to_string(),
            r#"{"W_enc":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#.to_string(),
            r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
                "W_enc":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#
                .to_string(),
            format!(
                r#"{{"W_enc":{{"dtype":"F32","shape":[2],"data_offsets":[{huge},{}]}}}}"#,
                huge + 8
            ),
            r#"{"W_enc":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#.to_string(),
            r#"{"W_enc":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#.to_string(),
            "{".repeat(500),
        ];
        for header in headers {
            let length = (header.len() as u64).to_le_bytes();
            fs::write(&weights, [&length[..], header.as_bytes(), &[0; 8]].concat()).unwrap();
            case.fails(Status::Format, &["sae_weights.safetensors"]);
        }
        // No bytes at all, but 2^62 latents.
        let empty = format!(
            r#"{{"W_enc":{{"dtype":"F32","shape":[0,{0}],"data_offsets":[0,0]}},
                "b_enc":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}},
                "b_dec":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}}}"#,
            1u64 << 62
        );
        let length = (empty.len() as u64).to_le_bytes();
        fs::write(&weights, [&length[..], empty.as_bytes()].concat()).unwrap();
        case.edit_config(|cfg| {
            cfg.remove("d_in");
            cfg.remove("d_sae");
        });
        case.fails(Status::Format, &["W_enc"]);
    }

    #[test]
    fn a_file_that_shrinks_while_open_is_an_error() {
        let case = Case::of("standard");
        let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
        let weights = case.path("sae_weights.safetensors");
        let file = fs::OpenOptions::new().write(true).open(weights).unwrap();
        file.set_len(900).unwrap();
        let error = sae.gather(&[0, 39]).err().unwrap();
        assert_eq!(error.status, Status::Io);
        assert!(error.message.contains("shorter"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_fifo_does_not_block() {
        let temp = TempDir::new().unwrap();
        let path = temp.path().join("pipe.safetensors");
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        let error = Sae::open(&path, &SaeOptions::default()).err().unwrap();
        assert_eq!(error.status, Status::Io);
    }

    /// Bytes changed at random in a valid folder: an SAE or an error, never a panic.
    #[test]
    fn mutations_never_panic() {
        let seed = 0x5eed_2026_u64;
        println!("seed {seed:#x}");
        let mut random = Random(seed);
        for name in ["standard", "jumprelu", "gated", "topk_scaled"] {
            let case = Case::of(name);
            let temp = case.path("partial.safetensors");
            open(name).unwrap().convert(Some(&[5, 3, 30]), &temp, &mut |_, _| {}).unwrap();
            for target in ["sae_weights.safetensors", "cfg.json", "partial.safetensors"] {
                let path = case.path(target);
                let sound = fs::read(&path).unwrap();
                for _ in 0..500 {
                    fs::write(&path, random.mutate(&sound)).unwrap();
                    let opened = match target {
                        "partial.safetensors" => path.as_path(),
                        _ => case.folder(),
                    };
                    if let Ok(sae) = Sae::open(opened, &SaeOptions::default()) {
                        let _ = sae.describe();
                        let _ = sae.gather(&[5, 3, 30]);
                    }
                }
                fs::write(&path, sound).unwrap();
            }
        }
    }

    /// Xorshift: the same mutations on every machine.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 % n as u64) as usize
        }

        /// One to four changes, mostly in the header, where they matter.
        fn mutate(&mut self, sound: &[u8]) -> Vec<u8> {
            let mut bytes = sound.to_vec();
            for _ in 0..=self.below(4) {
                if bytes.len() < 2 {
                    break;
                }
                let reach = if self.below(4) == 0 { bytes.len() } else { bytes.len().min(700) };
                let at = self.below(reach);
                match self.below(6) {
                    0 => bytes[at] ^= 1 << self.below(8),
                    1 => bytes[at] = b"0123456789[]{},:\""[self.below(17)],
                    2 => bytes[at] = [0, 0xff, 0x7f, 0x80][self.below(4)],
                    3 => drop(bytes.remove(at)),
                    4 => bytes.insert(at, b"09-e.\"{}"[self.below(8)]),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            bytes
        }
    }
}

/// Names and places that trainers and libraries put around the same tensors.
mod wrapped {
    use super::*;

    #[test]
    fn names_of_wrappers_are_taken_away() {
        let plain = open("jumprelu").unwrap();
        for prefix in [
            "_orig_mod.",
            "module.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "model._orig_mod.",
            "state_dict.module.",
            "_fsdp_wrapped_module.",
            "sae.",
        ] {
            let case = Case::of("jumprelu");
            case.edit(|file| file.rename(|name| format!("{prefix}{name}")));
            let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
            assert_eq!(gather_all(&sae), gather_all(&plain), "{prefix}");
        }
        // A trainer's own tensors beside the model's are not the model's.
        let case = Case::of("jumprelu");
        case.edit(|file| {
            let moments = file.tensors["b_enc"].clone();
            file.rename(|name| format!("model_state_dict.{name}"));
            file.tensors.insert("optimizer_state_dict.state.0.exp_avg".into(), moments);
        });
        let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
        assert_eq!(gather_all(&sae), gather_all(&plain));
        // But two models are not told apart.
        let case = Case::of("jumprelu");
        case.edit(|file| {
            let other = file.tensors["b_enc"].clone();
            file.tensors.insert("_orig_mod.b_enc".into(), other);
        });
        case.fails(Status::Format, &["b_enc", "twice"]);
        let case = Case::of("jumprelu");
        case.edit(|file| file.rename(|name| format!("left.{name}")));
        case.fails(Status::TensorMissing, &["W_enc", "holds", "left.b_enc"]);
    }

    /// Writes the tensors of a fixture as two files and their index.
    fn shards(case: &Case, keep: bool) {
        let whole = Tensors::read(&case.path("sae_weights.safetensors"));
        let name = |part: usize| format!("model-{part:05}-of-00002.safetensors");
        let mut map = Map::new();
        for part in [1, 2] {
            let first = |name: &str| matches!(name, "W_enc" | "b_dec");
            let mut shard = Tensors { tensors: HashMap::new(), metadata: whole.metadata.clone() };
            for (tensor, value) in &whole.tensors {
                if first(tensor) == (part == 1) {
                    shard.tensors.insert(tensor.clone(), value.clone());
                    map.insert(tensor.clone(), json!(name(part)));
                }
            }
            shard.write(&case.path(&name(part)));
        }
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        case.write("model.safetensors.index.json", &index.to_string());
        if !keep {
            fs::remove_file(case.path("sae_weights.safetensors")).unwrap();
        }
    }

    #[test]
    fn tensors_are_read_across_files() {
        let plain = open("topk_rescaled").unwrap();
        let case = Case::of("topk_rescaled");
        shards(&case, false);
        let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
        assert_eq!(gather_all(&sae), gather_all(&plain));
        assert_eq!(sae.recipe(), plain.recipe());
        let error = sae.file_sha256(&mut |_, _| {}).unwrap_err();
        assert_eq!(error.status, Status::Unsupported, "{error}");
        assert!(error.message.contains("several files"), "{error}");
        // No shard is overwritten by what is made of it.
        let shard = case.path("model-00002-of-00002.safetensors");
        let error = sae.convert(None, &shard, &mut |_, _| {}).unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument, "{error}");
        let out = case.path("one.safetensors");
        sae.convert(None, &out, &mut |_, _| {}).unwrap();
        let again = Sae::open(&out, &SaeOptions::default()).unwrap();
        assert_eq!(gather_all(&again), gather_all(&plain));
        // The index itself, with the recipe beside the tensors or given.
        let recipe = config(case.folder());
        let options = SaeOptions { recipe: Some(recipe), input_scale: None };
        let index = Sae::open(case.path("model.safetensors.index.json"), &options).unwrap();
        assert_eq!(gather_all(&index), gather_all(&plain));
    }

    #[test]
    fn faults_of_an_index_are_named() {
        let case = Case::of("standard");
        shards(&case, false);
        let sound = fs::read_to_string(case.path("model.safetensors.index.json")).unwrap();
        let change = |from: &str, to: &str| {
            assert!(sound.contains(from), "{sound}");
            case.write("model.safetensors.index.json", &sound.replace(from, to));
        };
        let (first, second) =
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
        let outside = case.path("model-00009-of-00002.safetensors");
        for (from, to, status, words) in [
            (second, "../outside.safetensors", Status::Format, ["beside the index", "../outside"]),
            (second, "/etc/passwd", Status::Format, ["beside the index", "/etc/passwd"]),
            (second, "a\\\\b", Status::Format, ["beside the index", "a\\\\b"]),
            (second, "gone.safetensors", Status::Io, ["gone.safetensors", "missing"]),
            (second, first, Status::TensorMissing, ["is not in", first]),
            ("weight_map", "weights", Status::Format, ["weight_map", "index.json"]),
            ("{\"total_size\":1}", "NaN", Status::Format, ["index.json", "the key metadata"]),
        ] {
            change(from, to);
            case.fails(status, &words);
        }
        case.write("model.safetensors.index.json", &sound);
        fs::rename(case.path(second), &outside).unwrap();
        case.fails(Status::Io, &[second, "missing"]);
        fs::rename(outside, case.path(second)).unwrap();
        fs::remove_file(case.path("model.safetensors.index.json")).unwrap();
        case.fails(Status::Io, &[first, second, "model.safetensors.index.json) is missing"]);
        // JSON is not taken for weights.
        case.write("notes.json", "{\"meta\": 1}");
        let error = Sae::open(case.path("notes.json"), &SaeOptions::default()).err().unwrap();
        assert!(error.message.contains("weight_map"), "{error}");
    }

    #[test]
    fn unknown_tensors_are_listed() {
        let case = Case::of("standard");
        fs::remove_file(case.path("cfg.json")).unwrap();
        case.edit(|file| file.rename(|name| format!("left.{name}")));
        case.fails(Status::Format, &["no known format", "left.W_enc"]);
    }
}

mod convert {
    use super::*;

    #[test]
    fn keeps_the_bits_and_the_recipe() {
        let temp = TempDir::new().unwrap();
        for entry in fs::read_dir(fixtures()).unwrap() {
            let folder = entry.unwrap().path();
            let sae = Sae::open(&folder, &SaeOptions::default()).unwrap();
            let whole = temp.path().join("whole.safetensors");
            let mut last = (0, 1);
            sae.convert(None, &whole, &mut |done, all| last = (done, all)).unwrap();
            assert_eq!(last.0, last.1);
            let read = Sae::open(&whole, &SaeOptions::default()).unwrap();
            assert_eq!(gather_all(&read), gather_all(&sae), "{}", folder.display());
            assert_eq!(same_format(&read), same_format(&sae));

            let ids = [17, 2, 11];
            let part = temp.path().join("part.safetensors");
            sae.convert(Some(&ids), &part, &mut |_, _| {}).unwrap();
            let read = Sae::open(&part, &SaeOptions::default()).unwrap();
            assert_eq!(read.gather(&ids).unwrap(), sae.gather(&ids).unwrap());
            assert_eq!(read.gather(&[11]).unwrap(), sae.gather(&[11]).unwrap());
            assert_eq!(same_format(&read), same_format(&sae));
            assert_eq!(read.describe().unwrap()["stored_latents"], 3);
            let error = read.gather(&[2, 3]).err().unwrap();
            assert_eq!(error.status, Status::LatentRange);
            for word in ["part.safetensors", "latent 3", "17, 2, 11"] {
                assert!(error.message.contains(word), "{error}");
            }

            // A partial file can be converted again, and then holds no more than it did.
            let again = temp.path().join("again.safetensors");
            read.convert(None, &again, &mut |_, _| {}).unwrap();
            let reread = Sae::open(&again, &SaeOptions::default()).unwrap();
            assert_eq!(reread.gather(&ids).unwrap(), sae.gather(&ids).unwrap());
            assert_eq!(
                read.convert(Some(&[3]), &again, &mut |_, _| {}).err().unwrap().status,
                Status::LatentRange
            );
        }
    }

    #[test]
    fn says_where_it_came_from() {
        let temp = TempDir::new().unwrap();
        let out = temp.path().join("out.safetensors");
        open("gated").unwrap().convert(Some(&[1]), &out, &mut |_, _| {}).unwrap();
        let metadata = Tensors::read(&out).metadata.unwrap();
        assert!(metadata["source"].ends_with("gated/sae_weights.safetensors"));
        assert!(metadata["converted_by"].starts_with("blockem "));
        assert!(metadata["source_cfg"].contains("sae_lens_version"));
    }

    #[test]
    fn leaves_nothing_behind_on_errors() {
        let case = Case::of("standard");
        case.edit(|file| file.set("W_enc", 4, f32::NAN));
        let sae = Sae::open(case.folder(), &SaeOptions::default()).unwrap();
        let temp = TempDir::new().unwrap();
        let out = temp.path().join("out.safetensors");
        let status = |ids: Option<&[u64]>, out: &Path| {
            sae.convert(ids, out, &mut |_, _| {}).err().unwrap().status
        };
        assert_eq!(status(Some(&[3, 4]), &out), Status::NonFinite);
        assert_eq!(status(Some(&[3, 40]), &out), Status::LatentRange);
        assert_eq!(status(Some(&[3, 3]), &out), Status::LatentDuplicate);
        assert_eq!(status(Some(&[]), &out), Status::InvalidArgument);
        assert_eq!(status(None, &temp.path().join("no/such/folder.safetensors")), Status::Io);
        assert_eq!(status(None, temp.path()), Status::Io);
        let weights = case.path("sae_weights.safetensors");
        assert_eq!(status(None, &weights), Status::InvalidArgument);
        fs::OpenOptions::new().write(true).open(weights).unwrap().set_len(900).unwrap();
        assert_eq!(status(None, &out), Status::Io);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    /// The format names where the arrays lie, not what they mean.
    fn same_format(sae: &Sae) -> Recipe {
        Recipe { format: "", ..sae.recipe().clone() }
    }
}

/// A dictionary of 128 MiB, mostly holes that take no room on the disk.
#[cfg(unix)]
mod large {
    use super::*;
    use std::os::unix::fs::FileExt;

    const D: usize = 512;
    const F: usize = 65_536;
    /// On both sides of where two readers divide the rows, and of their buffers.
    const ROWS: [usize; 7] = [0, 15, 16, 255, 256, 257, 511];

    /// Few columns, many scattered ones, adjoining ones: each is read another way.
    #[test]
    fn columns_are_read_alike() {
        let temp = dictionary();
        let sae = Sae::open(temp.path(), &SaeOptions::default()).unwrap();
        let few: Vec<u64> = (0..20).map(|i| i * 3001 + 5).collect();
        let many: Vec<u64> = (0..3000).map(|i| (i * 12_347 + 5) % F as u64).collect();
        let adjoining: Vec<u64> = (40_000..44_096).collect();
        for ids in [few, many, adjoining] {
            let rows = sae.gather(&ids).unwrap();
            for (id, row) in ids.iter().zip(rows.weight.chunks_exact(D)) {
                for (i, w) in row.iter().enumerate() {
                    let expected = if ROWS.contains(&i) { value(i, *id as usize) } else { 0.0 };
                    assert_eq!(*w, expected, "latent {id}, input {i}");
                }
            }
        }
    }

    /// The dictionary's pages must not stay in memory.
    #[cfg(target_os = "linux")]
    #[test]
    fn memory_stays_small() {
        let temp = dictionary();
        let ids: Vec<u64> = (0..20).map(|i| i * 3001 + 5).collect();
        let before = resident();
        let sae = Sae::open(temp.path(), &SaeOptions::default()).unwrap();
        let rows = sae.gather(&ids).unwrap();
        let grown = resident().saturating_sub(before);
        assert_eq!(rows.weight[0], value(0, 5));
        assert!(grown < 48 << 20, "resident memory grew by {grown} bytes");
    }

    fn value(input: usize, latent: usize) -> f32 {
        (input * 7 + latent) as f32
    }

    fn dictionary() -> TempDir {
        let temp = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let w = D * F * 4;
        let header = format!(
            r#"{{"W_enc":{{"dtype":"F32","shape":[{D},{F}],"data_offsets":[0,{w}]}},
                "b_enc":{{"dtype":"F32","shape":[{F}],"data_offsets":[{w},{b}]}},
                "b_dec":{{"dtype":"F32","shape":[{D}],"data_offsets":[{b},{end}]}}}}"#,
            b = w + 4 * F,
            end = w + 4 * (F + D),
        );
        let start = 8 + header.len() as u64;
        let file = fs::File::create(temp.path().join("sae_weights.safetensors")).unwrap();
        file.set_len(start + (w + 4 * (F + D)) as u64).unwrap();
        file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).unwrap();
        file.write_all_at(header.as_bytes(), 8).unwrap();
        for i in ROWS {
            let row: Vec<u8> = (0..F).flat_map(|j| value(i, j).to_le_bytes()).collect();
            file.write_all_at(&row, start + (i * F * 4) as u64).unwrap();
        }
        fs::write(temp.path().join("cfg.json"), r#"{"architecture": "standard"}"#).unwrap();
        temp
    }

    #[cfg(target_os = "linux")]
    fn resident() -> usize {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/sae")
}

fn open(name: &str) -> Result<Sae> {
    Sae::open(fixtures().join(name), &SaeOptions::default())
}

fn gather_all(sae: &Sae) -> EncoderRows {
    let ids: Vec<u64> = (0..sae.recipe().d_sae as u64).collect();
    sae.gather(&ids).unwrap()
}

fn config(folder: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(folder.join("cfg.json")).unwrap()).unwrap()
}

/// The file's arrays as a caller would describe them, by the recipe.
fn described<'a>(file: &'a Tensors, recipe: &Recipe) -> SaeTensors<'a> {
    let tensor = |name: &str| file.tensors.contains_key(name).then(|| file.tensor(name));
    SaeTensors {
        k: recipe.k,
        encoder_bias: tensor("b_enc"),
        decoder_bias: tensor("b_dec"),
        threshold: tensor("threshold"),
        gate_bias: tensor("b_gate"),
        magnitude_bias: tensor("b_mag"),
        magnitude_log_scale: tensor("r_mag"),
        decoder_weight: tensor("W_dec"),
        apply_b_dec_to_input: recipe.b_dec_subtracted,
        rescale_acts_by_decoder_norm: recipe.decoder_norm_folded,
        input_scale: recipe.scale,
        ..SaeTensors::new(recipe.architecture, recipe.d_in, recipe.d_sae, file.tensor("W_enc"))
    }
}

/// A fixture's folder, copied to be spoilt.
struct Case {
    temp: TempDir,
}

impl Case {
    fn of(name: &str) -> Case {
        let temp = TempDir::new().unwrap();
        for entry in fs::read_dir(fixtures().join(name)).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), temp.path().join(entry.file_name())).unwrap();
        }
        Case { temp }
    }

    fn folder(&self) -> &Path {
        self.temp.path()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn edit(&self, change: impl FnOnce(&mut Tensors)) {
        let path = self.path("sae_weights.safetensors");
        let mut file = Tensors::read(&path);
        change(&mut file);
        file.write(&path);
    }

    fn edit_config(&self, change: impl FnOnce(&mut Map<String, Value>)) {
        let mut cfg = config(self.folder());
        change(&mut cfg);
        self.write("cfg.json", &Value::Object(cfg).to_string());
    }

    fn error(&self) -> Error {
        match Sae::open(self.folder(), &SaeOptions::default()) {
            Ok(_) => panic!("opened without an error"),
            Err(error) => error,
        }
    }

    fn fails(&self, status: Status, words: &[&str]) {
        let error = self.error();
        assert_eq!(error.status, status, "{error}");
        for word in words {
            assert!(error.message.contains(word), "no {word:?} in: {error}");
        }
    }
}

/// A safetensors file in memory.
struct Tensors {
    tensors: HashMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    metadata: Option<HashMap<String, String>>,
}

impl Tensors {
    fn rename(&mut self, new: impl Fn(&str) -> String) {
        let old = std::mem::take(&mut self.tensors);
        self.tensors = old.into_iter().map(|(name, tensor)| (new(&name), tensor)).collect();
    }

    fn read(path: &Path) -> Tensors {
        let bytes = fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file
            .iter()
            .map(|(n, t)| (n.to_string(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())))
            .collect();
        Tensors { tensors, metadata: header.metadata().clone() }
    }

    fn write(&self, path: &Path) {
        let views = self
            .tensors
            .iter()
            .map(|(n, (d, s, b))| (n.clone(), TensorView::new(*d, s.clone(), b).unwrap()));
        serialize_to_file(views, self.metadata.clone(), path).unwrap();
    }

    fn numbers(&self, name: &str) -> Vec<f64> {
        let (dtype, _, bytes) = &self.tensors[name];
        match dtype {
            Dtype::F32 => bytes
                .chunks_exact(4)
                .map(|c| f32::from_le_bytes(c.try_into().unwrap()) as f64)
                .collect(),
            Dtype::F64 => {
                bytes.chunks_exact(8).map(|c| f64::from_le_bytes(c.try_into().unwrap())).collect()
            }
            other => panic!("{name} is {other:?}"),
        }
    }

    fn tensor(&self, name: &str) -> Tensor<'_> {
        use blockem::tensor::{DType, Device};
        let (dtype, shape, bytes) = &self.tensors[name];
        let dtype = match dtype {
            Dtype::F32 => DType::F32,
            Dtype::F64 => DType::F64,
            other => panic!("{name} is {other:?}"),
        };
        let stride: Vec<usize> =
            (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
        // SAFETY: the bytes are the row-major elements of the shape.
        unsafe { Tensor::from_raw(bytes.as_ptr(), dtype, Device::Cpu, shape, &stride).unwrap() }
    }

    fn transpose(&mut self, name: &str) {
        let (dtype, shape, bytes) = self.tensors.get_mut(name).unwrap();
        let (rows, columns, size) = (shape[0], shape[1], dtype.bitsize() / 8);
        let mut turned = Vec::with_capacity(bytes.len());
        for c in 0..columns {
            for r in 0..rows {
                turned.extend_from_slice(&bytes[(r * columns + c) * size..][..size]);
            }
        }
        *bytes = turned;
        *shape = vec![columns, rows];
    }

    /// Another shape, with as many bytes as it needs.
    fn reshape(&mut self, name: &str, shape: &[usize]) {
        let (dtype, old, bytes) = self.tensors.get_mut(name).unwrap();
        bytes.resize(shape.iter().product::<usize>() * dtype.bitsize() / 8, 0);
        *old = shape.to_vec();
    }

    fn set(&mut self, name: &str, at: usize, value: f32) {
        let (dtype, _, bytes) = self.tensors.get_mut(name).unwrap();
        assert_eq!(*dtype, Dtype::F32);
        bytes[at * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }
}
