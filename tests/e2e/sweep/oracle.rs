//! What has to hold after a run, whatever was killed or failed in it.

use std::fs;
use std::path::Path;

use super::bench::{Bench, Run, references, trees};
use super::scenario::Scenario;
use crate::git::git;
use crate::pair::Host;

/// Everything that is wrong; nothing when all is well. Both hosts are stopped; afterwards the standby is the active's.
pub(super) fn judge(bench: &Bench, run: &Run) -> Vec<String> {
    let mut wrong = run.violations.clone();
    wrong.extend(look_raw(bench));
    wrong.extend(recover(bench, run.acknowledged));
    match bench.try_send() {
        Ok(()) => {
            let last = bench.states.last().unwrap();
            wrong.extend(told("after an undisturbed send", last.differences(&trees(&bench.pair.standby))));
            wrong.extend(leftovers(&bench.pair.standby, &["stage/f", "stage/t", "trash", "quarantine"]));
        }
        Err(e) => wrong.push(e),
    }
    wrong
}

/// What git says of the repositories before anything of coldspare ran again (G1).
fn look_raw(bench: &Bench) -> Vec<String> {
    let mut wrong = Vec::new();
    for name in Scenario::repositories() {
        let repository = bench.pair.standby.home.join(name);
        let known: Vec<_> = bench.states.iter().filter_map(|state| state.refs.get(name)).collect();
        if !repository.join("HEAD").exists() {
            if known.len() == bench.states.len() {
                wrong.push(format!("raw: the repository {name} is missing"));
            }
            continue;
        }
        let checked = git(&repository, &["fsck", "--full"]);
        if checked.code != 0 {
            wrong.push(format!("raw: fsck of {name}: {checked:?}"));
            continue;
        }
        let found = references(&repository);
        for (reference, value) in &found {
            if !known.iter().any(|refs| refs.get(reference) == Some(value)) {
                wrong.push(format!("raw: {reference} of {name} is {value}, which it never was"));
            }
        }
        let always = known[0].keys().filter(|reference| known.iter().all(|refs| refs.contains_key(*reference)));
        wrong.extend(always.filter(|r| !found.contains_key(*r)).map(|r| format!("raw: {r} of {name} is missing")));
    }
    wrong
}

/// What the standby is once it was opened (G1, G3, G4), and that opening it again changes nothing.
fn recover(bench: &Bench, acknowledged: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let standby = &bench.pair.standby;
    let verified = standby.run(&["verify", "--deep", "--json"]);
    let found = trees(standby);
    let allowed = if acknowledged { bench.states.len() - 1 } else { bench.floor };
    let is = bench.states.iter().position(|state| state.differences(&found).is_empty());
    match is {
        Some(n) if n >= allowed => {}
        Some(n) => wrong.push(format!("the standby is at state {n} of {} (acknowledged: {acknowledged})", bench.states.len())),
        None => {
            let differences = bench.states.iter().map(|state| state.differences(&found)).min_by_key(Vec::len);
            wrong.extend(told("the recovered tree is none of the known", differences.unwrap_or_default()));
        }
    }
    let is_unseeded = bench.scenario == Scenario::Seed && is == Some(0) && verified.code == 1 && verified.out.contains("\"empty\"");
    if verified.code != 0 && !is_unseeded {
        wrong.push(format!("verify --deep: {verified:?}"));
    }
    let again = standby.run(&["verify", "--json"]);
    if again.code != verified.code {
        wrong.push(format!("a second verification: {again:?}"));
    }
    if found != trees(standby) {
        wrong.push("a second recovery changed something".into());
    }
    let empty: &[&str] =
        if is == Some(bench.states.len() - 1) { &["stage/f", "stage/t", "trash", "quarantine"] } else { &["trash", "quarantine"] };
    wrong.extend(leftovers(standby, empty));
    let epoch = standby.run(&["status", "--json"]).json()["epoch"].as_u64();
    if epoch.is_none_or(|epoch| epoch < bench.epoch) {
        wrong.push(format!("the promised epoch is {epoch:?} after {}", bench.epoch));
    }
    wrong
}

/// What is in work folders that have to be empty, or not to be there.
fn leftovers(standby: &Host, empty: &[&str]) -> Vec<String> {
    let mut out = Vec::new();
    for root in [&standby.home, &standby.store] {
        for folder in empty {
            let names = |dir: &Path| fs::read_dir(dir).map(|d| d.map(|e| e.unwrap().file_name()).collect::<Vec<_>>()).unwrap_or_default();
            let found = names(&root.join(".coldspare").join(folder));
            if !found.is_empty() {
                out.push(format!("{folder} holds {found:?}"));
            }
        }
    }
    out
}

fn told(what: &str, differences: Vec<String>) -> Vec<String> {
    differences.into_iter().take(5).map(|difference| format!("{what}: {difference}")).collect()
}
