//! The function that decides roles, in every order of messages, crashes, promotions and switchovers within bounds.
//!
//! `COLDSPARE_MODEL_STATES=4000000` looks at more states.

use std::time::Instant;

use coldspare_sim::failover::{Bounds, Defect, Explored, explore};

const NOTHING: Bounds = Bounds { writes: 0, forced: 0, power_cuts: 0, kills: 0, planned: 0, messages: 7, offers: false };

/// What is looked at: each within its bounds, as far as the number of states allows.
const SETTINGS: &[(&str, Bounds)] = &[
    ("switchovers", Bounds { writes: 2, planned: 1, kills: 1, messages: 8, offers: true, ..NOTHING }),
    ("there and back", Bounds { writes: 2, planned: 2, messages: 12, ..NOTHING }),
    ("switchovers and power cuts", Bounds { writes: 2, planned: 1, power_cuts: 2, ..NOTHING }),
    ("failover", Bounds { writes: 2, forced: 1, power_cuts: 1, ..NOTHING }),
    ("both forced", Bounds { writes: 1, forced: 2, planned: 1, ..NOTHING }),
    ("everything", Bounds { writes: 2, forced: 1, planned: 1, power_cuts: 1, kills: 1, offers: true, ..NOTHING }),
];

fn look(name: &str, bounds: Bounds, defect: Defect, states_max: usize) -> Explored {
    let start = Instant::now();
    let found = explore(bounds, defect, states_max);
    let extent = if found.is_all { "all" } else { "the nearest" };
    println!("{name}: {} states ({extent}), {:.1} s, unreached: {:?}", found.states, start.elapsed().as_secs_f64(), found.unreached);
    for broken in &found.broken {
        println!("  {}:\n{}", broken.name, broken.path);
    }
    found
}

#[test]
fn no_order_of_events_breaks_an_invariant_and_all_that_should_be_possible_is() {
    let states_max = std::env::var("COLDSPARE_MODEL_STATES").map_or(400_000, |v| v.parse().expect("a number"));
    let mut states = 0;
    let mut unreached: Option<Vec<&str>> = None;
    for (name, bounds) in SETTINGS {
        let found = look(name, *bounds, Defect::None, states_max);
        assert!(found.broken.is_empty(), "{name}");
        states += found.states;
        let before = unreached.take().unwrap_or_else(|| found.unreached.clone());
        unreached = Some(before.into_iter().filter(|name| found.unreached.contains(name)).collect());
    }
    println!("{states} states");
    assert_eq!(unreached, Some(Vec::new()), "what should be possible was not met");
}

/// The setting in which the defect shows, and the invariant that it breaks.
#[track_caller]
fn check_caught(defect: Defect, setting: &str, invariant: &str) {
    let (name, bounds) = SETTINGS.iter().find(|(name, _)| *name == setting).expect("a setting");
    let found = look(&format!("{defect:?} in {name}"), *bounds, defect, 400_000);
    assert!(found.broken.iter().any(|broken| broken.name.starts_with(invariant)), "{defect:?} goes unnoticed");
}

#[test]
fn each_defect_of_a_driver_is_caught() {
    check_caught(Defect::QuarantineIsSkipped, "failover", "I2");
    check_caught(Defect::QuarantineComesLate, "failover", "I2");
    check_caught(Defect::QuarantineIsNotSynced, "failover", "I2");
    check_caught(Defect::RecordsAreNotStored, "switchovers", "I");
    check_caught(Defect::AnswersComeFirst, "switchovers and power cuts", "I3");
    check_caught(Defect::HalfAppliedIsPromoted, "failover", "I7");
    check_caught(Defect::PowerCutsAreNotNoticed, "switchovers and power cuts", "I4");
    check_caught(Defect::AnySessionIsApplied, "switchovers and power cuts", "I6");
    check_caught(Defect::HandoversForgetTheLastWrite, "switchovers", "I5");
}
