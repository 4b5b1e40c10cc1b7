//! Latent sets: what is legal, what K0.json keeps, what provenance refuses.

mod support;

use blockem::error::Status;
use blockem::latents::{Latents, Provenance};
use blockem::plan::{Activation, Plan, PlanOptions};
use blockem::sae::Architecture;
use support::{RandomSae, Rng};

fn refused(text: &str) -> (Status, String) {
    let error = Latents::from_json(text.as_bytes()).expect_err(text);
    (error.status, error.message)
}

#[test]
fn columns_are_k_pos_then_k_neg() {
    let set = Latents::from_json(br#"{"K_neg": [9, 2], "K_pos": [7, 30], "weights": {"2": 0.5}}"#);
    let set = set.unwrap();
    assert_eq!(set.ids(), [7, 30, 9, 2]);
    assert_eq!(set.signs(), [1, 1, -1, -1]);
    assert_eq!(set.weights(), [1.0, 1.0, 1.0, 0.5]);
}

#[test]
fn one_side_may_be_empty_but_not_both() {
    assert_eq!(Latents::from_json(br#"{"K_pos": [], "K_neg": [3]}"#).unwrap().len(), 1);
    assert_eq!(refused(r#"{"K_pos": [], "K_neg": []}"#).0, Status::Format);
    assert_eq!(refused(r#"{"K_pos": [1]}"#).0, Status::Format);
}

#[test]
fn bad_sets_are_refused() {
    assert_eq!(refused(r#"{"K_pos": [1, 1], "K_neg": []}"#).0, Status::LatentDuplicate);
    let (status, message) = refused(r#"{"K_pos": [1], "K_neg": [1]}"#);
    assert_eq!(status, Status::LatentDuplicate);
    assert!(message.contains("latent 1"), "{message}");
    assert_eq!(refused(r#"{"K_pos": [-1], "K_neg": []}"#).0, Status::LatentRange);
    assert_eq!(refused(r#"{"K_pos": [1.5], "K_neg": []}"#).0, Status::Format);
    assert_eq!(refused(r#"{"K_pos": ["1"], "K_neg": []}"#).0, Status::Format);
    assert_eq!(refused(r#"{"K_pos": [1e30], "K_neg": []}"#).0, Status::Format);
    assert_eq!(refused(r#"{"K_pos": [1], "K_neg": [], "weights": {"2": 1}}"#).0, Status::Format);
    let negative = r#"{"K_pos": [1], "K_neg": [], "weights": {"1": -1}}"#;
    assert_eq!(refused(negative).0, Status::InvalidArgument);
    let huge = r#"{"K_pos": [1], "K_neg": [], "weights": {"1": 1e300}}"#;
    assert_eq!(refused(huge).0, Status::InvalidArgument);
    for text in ["", "[1]", "{", "nul", r#"{"K_pos": 1, "K_neg": []}"#, "\u{0}"] {
        assert_eq!(refused(text).0, Status::Format, "{text:?}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(refused(&deep).0, Status::Format);
    assert!(Latents::new(&[1], &[0], None).is_err());
    assert!(Latents::new(&[1], &[1], Some(&[f32::NAN])).is_err());
    assert!(Latents::new(&[], &[], None).is_err());
}

#[test]
fn saving_keeps_foreign_keys_and_records_where_the_set_belongs() {
    let mut rng = Rng::fresh();
    let sae = RandomSae::new(&mut rng, Architecture::JumpRelu, 8, 16).open();
    let folder = tempfile::tempdir().unwrap();
    let (source, saved) = (folder.path().join("K0.json"), folder.path().join("saved.json"));
    std::fs::write(&source, r#"{"K_pos": [3], "selected_latents": [{"id": 3}], "K_neg": [5]}"#)
        .unwrap();
    let set = Latents::open(&source, &sae).unwrap();
    let options = PlanOptions { activation: Activation::DenseRelu, ..PlanOptions::default() };
    let plan = Plan::new(&sae, &set, &options).unwrap();
    set.save(&saved, Some(&Provenance::of(&set, &plan).unwrap())).unwrap();
    let text = std::fs::read_to_string(&saved).unwrap();
    assert!(text.contains("selected_latents"), "{text}");

    let again = Latents::open(&saved, &sae).unwrap();
    assert_eq!((again.ids(), again.signs()), (set.ids(), set.signs()));
    let made_for = again.provenance().unwrap();
    assert_eq!((made_for.d_in, made_for.d_sae), (8, 16));
    assert_eq!(made_for.identity, plan.identity());
    Plan::new(&sae, &again, &options).unwrap();

    let native = Plan::new(&sae, &again, &PlanOptions::default()).err().unwrap();
    assert_eq!(native.status, Status::ProvenanceMismatch);
    assert!(native.message.contains("dense_relu"), "{native}");
    let other = RandomSae::new(&mut rng, Architecture::JumpRelu, 8, 16).open();
    let foreign = Plan::new(&other, &again, &options).err().unwrap();
    assert_eq!(foreign.status, Status::ProvenanceMismatch);
    let wider = RandomSae::new(&mut rng, Architecture::JumpRelu, 8, 17).open();
    let misfit = Latents::open(&saved, &wider).err().unwrap();
    assert_eq!(misfit.status, Status::ProvenanceMismatch);
}

#[test]
fn a_set_is_saved_with_a_plan_of_its_own() {
    let mut rng = Rng::fresh();
    let sae = RandomSae::new(&mut rng, Architecture::Standard, 8, 16).open();
    let set = |ids: &[i64], signs: &[i8]| Latents::new(ids, signs, None).unwrap();
    let saved = set(&[3, 5], &[1, -1]);
    for other in [set(&[3, 6], &[1, -1]), set(&[5, 3], &[-1, 1]), set(&[3, 5], &[1, 1])] {
        let plan = Plan::new(&sae, &other, &PlanOptions::default()).unwrap();
        let error = Provenance::of(&saved, &plan).unwrap_err();
        assert_eq!(error.status, Status::InvalidArgument, "{error}");
    }
}

#[test]
fn a_set_of_mixed_signs_belongs_to_its_sae_after_saving() {
    let mut rng = Rng::fresh();
    let sae = RandomSae::new(&mut rng, Architecture::Gated, 8, 16).open();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("K0.json");
    let set = Latents::new(&[5, 2, 9, 0], &[-1, 1, -1, 1], Some(&[1.0, 2.0, 3.0, 4.0])).unwrap();
    let plan = Plan::new(&sae, &set, &PlanOptions::default()).unwrap();
    set.save(&path, Some(&Provenance::of(&set, &plan).unwrap())).unwrap();
    let again = Latents::open(&path, &sae).unwrap();
    assert_eq!(again.ids(), [2, 0, 5, 9]);
    assert_eq!(again.weights(), [2.0, 4.0, 1.0, 3.0]);
    let reread = Plan::new(&sae, &again, &PlanOptions::default()).unwrap();
    assert_ne!(reread.identity(), plan.identity(), "the columns stand in another order");
}

#[test]
fn files_that_cannot_be_read_or_written_are_named() {
    let mut rng = Rng::fresh();
    let sae = RandomSae::new(&mut rng, Architecture::Standard, 4, 4).open();
    let missing = Latents::open("/nonexistent/K0.json", &sae).err().unwrap();
    assert_eq!(missing.status, Status::Io);
    assert!(missing.message.contains("/nonexistent/K0.json"), "{missing}");
    let set = Latents::new(&[9], &[1], None).unwrap();
    let unwritable = set.save("/nonexistent/K0.json", None).err().unwrap();
    assert_eq!(unwritable.status, Status::Io);
    assert!(unwritable.message.contains("/nonexistent/K0.json"), "{unwritable}");
    let range = Plan::new(&sae, &set, &PlanOptions::default()).err().unwrap();
    assert_eq!(range.status, Status::LatentRange);
}
