//! Roles change: planned, by force, and back; nothing is lost, and there are never two actives by coldspare's doing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use coldspare_core::control::{ControlRecord, Role, SLOT_BYTES};
use serde_json::Value;

use crate::git::{self, commit, git_ok, push};
use crate::pair::{Host, Pair, let_times_age, until};

const REPOSITORY: &str = "shared/data/repositories/1";

/// A repository in the host's home, and a clone of it.
fn repository(pair: &Pair) -> PathBuf {
    let clone = pair.dir.path().join("clone");
    git::init_bare(&pair.active.home.join(REPOSITORY));
    git::clone(&pair.active.home.join(REPOSITORY), &clone);
    clone
}

/// Pushes a commit to whoever is the active.
fn push_to(host: &Host, clone: &Path, text: &str) {
    git_ok(clone, &["remote", "set-url", "origin", &host.home.join(REPOSITORY).to_string_lossy()]);
    commit(clone, "file", text);
    push(clone, &["HEAD:main"]);
}

pub(crate) fn role(host: &Host) -> Value {
    host.status()["role"].clone()
}

/// Waits until the host's daemon serves it as the active.
#[track_caller]
pub(crate) fn until_active(host: &Host) {
    until("it is the active", || {
        let status = host.status();
        status["role"] == "active" && status["watch"]["backend"] != "none"
    });
}

#[track_caller]
fn checkpoint(host: &Host) {
    host.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
}

#[track_caller]
fn assert_same(pair: &Pair) {
    pair.assert_equal();
    let there = pair.standby.home.join(REPOSITORY);
    git::assert_clean(&there);
    assert_eq!(git::references(&there), git::references(&pair.active.home.join(REPOSITORY)));
}

#[test]
fn a_switchover_loses_nothing_and_leads_back() {
    let pair = Pair::running();
    let clone = repository(&pair);
    push_to(&pair.active, &clone, "first");
    until("they are connected", || pair.active.status()["connected"] == true);
    let done = pair.active.run(&["switchover", "--json"]).expect_code(0).json();
    assert_eq!((&done["role"], &done["epoch"]), (&"standby".into(), &2.into()), "{done}");
    until_active(&pair.standby);
    assert_same(&pair);
    pair.active.run(&["switchover"]).expect_code(0); // is done

    push_to(&pair.standby, &clone, "second");
    checkpoint(&pair.standby);
    assert_same(&pair);
    pair.active.run(&["verify", "--deep", "--git"]).expect_code(0);

    pair.standby.run(&["switchover"]).expect_code(0);
    until_active(&pair.active);
    push_to(&pair.active, &clone, "third");
    checkpoint(&pair.active);
    assert_same(&pair);
    pair.standby.run(&["verify", "--deep", "--git"]).expect_code(0);
    assert_eq!(pair.active.status()["epoch"], 3);
    for host in [&pair.active, &pair.standby] {
        let lists = fs::read_dir(host.home.join(".coldspare/quarantine")).into_iter().flatten();
        let lists: Vec<String> = lists.map(|e| fs::read_to_string(e.unwrap().path().join("LIST")).unwrap_or_default()).collect();
        assert_eq!(lists, Vec::<String>::new(), "a planned change puts nothing in quarantine");
    }
}

/// What a new active sends of a home that both have.
#[test]
fn after_a_switchover_no_content_travels_again() {
    let pair = Pair::running();
    let mut noise = crate::seed::Seed::new(3);
    let large = noise.noise(8 << 20);
    pair.active.write("shared/large", large);
    checkpoint(&pair.active);
    let_times_age();
    pair.active.run(&["switchover"]).expect_code(0);
    until_active(&pair.standby);
    checkpoint(&pair.standby);
    let status = pair.standby.status();
    assert!(status["bytes_sent"].as_u64().unwrap() < 1 << 20, "{status}");
    // The first changeset of a session reads what it names; what the standby's manifest knew is not.
    assert!(status["bytes_read"].as_u64().unwrap() < 1 << 20, "{status}");
}

#[test]
fn a_handover_waits_for_the_promotion() {
    let pair = Pair::running();
    let clone = repository(&pair);
    push_to(&pair.active, &clone, "first");
    until("both are connected", || pair.standby.status()["connected"] == true && pair.standby.status()["seq"] != 0);
    pair.standby.run(&["promote"]).expect(1, "connected");
    pair.active.run(&["demote"]).expect_code(0);
    assert_eq!(role(&pair.active), "handover");
    assert_eq!(role(&pair.standby), "standby");
    let done = pair.standby.run(&["promote", "--json"]).expect_code(0).json();
    assert_eq!((&done["handed_over"], &done["loss_bound_ms"]), (&true.into(), &0.into()), "{done}");
    until_active(&pair.standby);
    until("the old active is a standby", || role(&pair.active) == "standby");
    pair.standby.run(&["promote"]).expect_code(0); // is done
    push_to(&pair.standby, &clone, "second");
    checkpoint(&pair.standby);
    assert_same(&pair);
}

#[test]
fn nothing_is_handed_over_while_something_is_amiss() {
    let mut pair = Pair::running();
    let clone = repository(&pair);
    push_to(&pair.active, &clone, "first");
    checkpoint(&pair.active);
    let config = fs::read_to_string(pair.active.config()).unwrap();
    fs::write(pair.active.config(), format!("{config}[hooks]\ndrain = {{ command = [\"/bin/false\"] }}\n")).unwrap();
    pair.active.kill();
    pair.active.start();
    until("they are connected", || pair.active.status()["connected"] == true);
    pair.active.run(&["switchover"]).expect(2, "drain");
    fs::write(pair.active.config(), config).unwrap();
    pair.active.kill();
    pair.active.start();
    checkpoint(&pair.active);
    pair.standby.kill();
    pair.standby.configure("[hands_off]\nheal = false\n");
    pair.standby.start();
    pair.active.write("after-the-restart", "only over a new link");
    checkpoint(&pair.active);
    fs::write(pair.standby.home.join(REPOSITORY).join("config"), "damaged").unwrap();
    pair.active.run(&["switchover"]).expect(1, "verify --repair");
    assert_eq!((role(&pair.active), role(&pair.standby)), ("active".into(), "standby".into()));
    pair.standby.run(&["verify", "--repair"]).expect_code(0);
    pair.standby.kill();
    until("the link is gone", || pair.active.status()["connected"] == false);
    pair.active.run(&["switchover"]).expect(3, "not connected");
    assert_eq!(role(&pair.active), "active");
}

/// Every file, without coldspare's own.
pub(crate) fn contents(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let walk = walkdir::WalkDir::new(root).into_iter().filter_entry(|e| e.file_name() != ".coldspare");
    let files = walk.map(Result::unwrap).filter(|e| e.file_type().is_file());
    files.map(|e| (e.path().strip_prefix(root).unwrap().into(), fs::read(e.path()).unwrap())).collect()
}

#[test]
fn an_old_active_is_refused_and_fails_back_with_its_pushes_in_quarantine() {
    let mut pair = Pair::running();
    let clone = repository(&pair);
    push_to(&pair.active, &clone, "replicated");
    checkpoint(&pair.active);
    until("the standby has noted as of when it is", || pair.standby.state().join("as-of").exists());
    // A push that the standby never sees.
    pair.standby.kill();
    commit(&clone, "lost", "not replicated");
    push(&clone, &["HEAD:refs/heads/lost"]);
    pair.active.write("shared/config/lost", "not replicated");
    pair.active.kill();
    let before = contents(&pair.active.home);

    pair.standby.start();
    pair.standby.run(&["promote"]).expect(1, "--fenced-by");
    pair.standby.run(&["promote", "--fenced-by", "false"]).expect(1, "not fenced");
    pair.standby.run(&["failover"]).expect(2, "hooks.fence");
    assert_eq!(role(&pair.standby), "standby");
    let done = pair.standby.run(&["promote", "--json", "--fenced-by", "true"]).expect_code(0).json();
    assert!(done["loss_bound_ms"].as_u64().is_some_and(|ms| ms > 0), "{done}");
    assert_eq!(done["handed_over"], false);
    until_active(&pair.standby);
    git_ok(&clone, &["reset", "-q", "--hard", "HEAD~1"]);
    push_to(&pair.standby, &clone, "after the failover");

    // It is told, stores it, and touches nothing.
    pair.active.run(&["run"]).expect(4, "fenced");
    pair.active.run(&["send"]).expect(4, "coldspare demote");
    pair.active.run(&["receive"]).expect(4, "coldspare demote");
    pair.active.run(&["switchover"]).expect(4, "coldspare demote");
    assert_eq!(contents(&pair.active.home), before);

    pair.active.run(&["demote"]).expect_code(0);
    pair.active.run(&["demote"]).expect_code(0); // is done
    assert_eq!(contents(&pair.active.home), before);
    // It has nothing of what the new active wrote.
    pair.active.run(&["promote", "--fenced-by", "true"]).expect(1, "nobody knows how old the tree is");
    pair.active.start();
    checkpoint(&pair.standby);
    assert_same(&pair);
    pair.active.run(&["verify", "--deep", "--git"]).expect_code(0);

    let kept = quarantine(&pair.active.home);
    let list = fs::read_to_string(kept.join("LIST")).unwrap();
    for path in [format!("{REPOSITORY}/refs/heads/lost"), "shared/config/lost".into()] {
        assert!(list.lines().any(|line| line.contains(&format!("\"path\":\"{path}\""))), "{path} is not in {list}");
    }
    assert_eq!(fs::read_to_string(kept.join("tree/shared/config/lost")).unwrap(), "not replicated");
    until("the bundle is made", || kept.join("bundles/LIST").exists());
    let bundle = kept.join("bundles").join(format!("{}.bundle", REPOSITORY.replace('/', "%")));
    let bundle = bundle.to_string_lossy();
    git_ok(&pair.active.home.join(REPOSITORY), &["bundle", "verify", "-q", &bundle]);
    let heads = git_ok(Path::new("/"), &["bundle", "list-heads", &bundle]);
    assert!(heads.contains("refs/heads/lost"), "{heads}");
    let again = pair.dir.path().join("again");
    git::clone(&pair.standby.home.join(REPOSITORY), &again);
    git_ok(&again, &["fetch", "-q", &bundle, "refs/heads/lost:refs/heads/found"]);
    assert_eq!(git_ok(&again, &["show", "found:lost"]), "not replicated");
}

#[test]
fn what_was_held_back_takes_no_folder_with_it_when_its_host_becomes_the_standby() {
    let pair = Pair::running();
    let clone = repository(&pair);
    push_to(&pair.active, &clone, "first");
    checkpoint(&pair.active);
    let broken = format!("{REPOSITORY}/refs/heads/broken");
    pair.active.write(&broken, "");
    pair.active.run(&["checkpoint", "--timeout", "80s"]).expect(1, "held back");
    pair.active.run(&["switchover"]).expect(1, "held back");
    pair.active.run(&["switchover", "--accept-held-back"]).expect_code(0);
    until_active(&pair.standby);
    push_to(&pair.standby, &clone, "on the new active");
    checkpoint(&pair.standby);
    // What the active lacked is set aside, and nothing else.
    let (here, there) = (pair.active.home.join(REPOSITORY), pair.standby.home.join(REPOSITORY));
    for part in ["HEAD", "config", "refs/heads/main", "objects"] {
        assert!(here.join(part).exists(), "{part} is gone");
    }
    assert_eq!(git::tip(&here, "refs/heads/main"), git::tip(&there, "refs/heads/main"));
    let repaired = pair.active.run(&["verify", "--deep", "--repair"]);
    assert!(repaired.code <= 1, "{repaired:#?}");
    checkpoint(&pair.standby);
    pair.active.run(&["verify", "--deep", "--git"]).expect_code(0);
    assert_same(&pair);
}

/// The one folder in a quarantine; what was foreign in the tree lies beside it.
#[track_caller]
pub(crate) fn quarantine(home: &Path) -> PathBuf {
    let all = fs::read_dir(home.join(".coldspare/quarantine")).unwrap().map(|e| e.unwrap().path());
    let all: Vec<PathBuf> = all.filter(|at| at.is_dir()).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0].clone()
}

/// As the control record says, whether or not a daemon runs.
pub(crate) fn stopped_role(host: &Host) -> String {
    let checked = host.run(&["check", "--json"]).json();
    let node = checked["findings"].as_array().unwrap().iter().find(|f| f["what"] == "node").unwrap()["detail"].as_str().unwrap();
    node.split(' ').next().unwrap().to_string()
}

/// The control record, whether or not a daemon runs, or is held.
pub(crate) fn record(host: &Host) -> ControlRecord {
    let bytes = fs::read(host.state().join("control")).unwrap();
    let slots = bytes.chunks(SLOT_BYTES).filter_map(ControlRecord::decode_slot);
    slots.max_by_key(|(seq, _)| *seq).unwrap().1
}

/// Whether both hosts are the active at one time; what is read of one after the other isn't of one time.
pub(crate) fn are_two_active(pair: &Pair) -> bool {
    let [before, other, after] = [&pair.active, &pair.standby, &pair.active].map(record);
    before == after && before.role == Role::Active && other.role == Role::Active
}

/// Adds hooks that note in `dir` that they ran, and what they were told.
fn set_hooks(host: &Host, dir: &Path, hooks: &[(&str, i32)]) {
    let mut config = fs::read_to_string(host.config()).unwrap();
    config.push_str("\n[hooks]\n");
    for (name, code) in hooks {
        let ran = dir.join(name);
        let script = format!("echo $COLDSPARE_ROLE >> {}; exit {code}", ran.display());
        config.push_str(&format!("{name} = {{ command = [\"/bin/sh\", \"-c\", {script:?}] }}\n"));
    }
    fs::write(host.config(), config).unwrap();
}

#[test]
fn hooks_run_when_roles_change_and_a_failed_one_is_told() {
    let mut pair = Pair::running();
    let dir = pair.dir.path().to_path_buf();
    let ran = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    pair.active.write("shared/config/file", "content");
    checkpoint(&pair.active);
    until("the standby has noted as of when it is", || pair.standby.state().join("as-of").exists());
    set_hooks(&pair.active, &dir, &[("drain", 0)]);
    set_hooks(&pair.standby, &dir, &[("promote", 7), ("fence_self", 0)]);
    pair.active.kill();
    pair.standby.kill();
    pair.standby.start();
    pair.active.start();
    checkpoint(&pair.active);
    pair.active.run(&["switchover"]).expect_code(0);
    until_active(&pair.standby);
    until("the failed hook is told", || pair.standby.status()["promote_hook"].as_str().is_some_and(|hook| hook.starts_with("failed")));
    assert_eq!((ran("drain"), ran("promote")), ("active\n".into(), "active\n".into()));
    // It is run again by nobody but a person.
    pair.standby.kill();
    pair.standby.start();
    until_active(&pair.standby);
    assert_eq!(ran("promote"), "active\n");
    pair.standby.run(&["hook", "promote"]).expect_code(1);
    assert!(pair.standby.status()["promote_hook"].as_str().unwrap().starts_with("failed"));

    // The other one is promoted by force: this one, when it comes back, keeps itself from writing.
    until("they are connected", || pair.standby.status()["connected"] == true);
    checkpoint(&pair.standby);
    pair.standby.kill();
    until("the link is gone", || pair.active.status()["connected"] == false);
    pair.active.run(&["promote", "--accept-possible-loss", "--accept-lag"]).expect_code(0);
    until_active(&pair.active);
    assert_eq!(ran("fence_self"), "");
    pair.standby.run(&["run"]).expect_code(4);
    // Fencing the other one proves nothing for this one.
    pair.standby.run(&["promote", "--fenced-by", "true"]).expect(4, "coldspare demote");
    assert_eq!((ran("fence_self"), role(&pair.standby)), ("active\n".into(), "fenced".into()));
}

#[test]
fn a_handover_that_is_late_is_given_up() {
    let pair = Pair::running();
    pair.active.write("shared/config/file", "content");
    checkpoint(&pair.active);
    let frozen = pair.standby.freeze();
    pair.active.write("shared/config/file", "more");
    pair.active.run(&["switchover", "--timeout", "2s"]).expect(3, "this host is the active still");
    drop(frozen);
    checkpoint(&pair.active);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!((role(&pair.active), role(&pair.standby)), ("active".into(), "standby".into()));
    pair.active.run(&["switchover"]).expect_code(0);
    until_active(&pair.standby);
}

#[test]
fn both_hosts_may_not_have_one_folder() {
    let mut pair = Pair::new();
    pair.active.write("shared/config/file", "content");
    let config = fs::read_to_string(pair.standby.config()).unwrap();
    let of = |path: &Path| path.to_str().unwrap().to_string();
    fs::write(pair.standby.config(), config.replace(&of(&pair.standby.home), &of(&pair.active.home))).unwrap();
    pair.active.start();
    pair.standby.run(&["receive"]).expect(2, "a folder of its own");
    assert_eq!(fs::read_to_string(pair.active.home.join("shared/config/file")).unwrap(), "content");
}

/// A guard on the host that is fenced asks for the failover, and is gone before it is done.
#[test]
fn a_failover_goes_on_though_nobody_listens_any_more() {
    let pair = Pair::running();
    pair.active.write("shared/config/file", "content");
    checkpoint(&pair.active);
    until("the standby has noted as of when it is", || pair.standby.state().join("as-of").exists());
    let mut command = pair.standby.program();
    command.args(["promote", "--accept-connection", "--fenced-by", "true", "--config"]).arg(pair.standby.config());
    let mut asked = command.env("COLDSPARE_LOG", "trace").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((asked.stdout.take(), asked.stderr.take()));
    assert_eq!(asked.wait().unwrap().code(), Some(0));
    until_active(&pair.standby);
}
