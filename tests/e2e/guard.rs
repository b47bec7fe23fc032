//! The guard, its hooks and the health endpoint, on a real process that stands in for Bitbucket.

use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::pair::{Host, free_port, run, succeeds, until};
use crate::stand_in::Guarded;

#[test]
fn a_hung_application_is_killed_proven_dead_and_started_without_failover() {
    let mut g = Guarded::new("", "");
    g.set("deaf");
    g.start_application();
    let first = g.pid("pid").unwrap();
    g.start_guard();
    g.wait_state("healthy");
    g.clear("deaf");
    g.say("hang");
    g.wait_state("correcting");
    until("it is started again", || g.ran().len() >= 3);
    assert!(!lives(first), "the deaf one is still there");
    g.say("RUNNING");
    g.wait_state("healthy");
    g.wait_news("corrected");
    assert_eq!(g.ran(), ["start", "stop", "start"]);
    assert_eq!(g.news(), ["correcting", "corrected"]);
    assert_eq!(g.guard()["attempts"], 0);
    // The daemon that sends shows it too, or its absence.
    assert_eq!(g.run(&["status", "--json"]).json()["guard"]["state"], "healthy");
}

#[test]
fn two_restarts_that_fail_lead_to_one_failover_even_if_the_guard_is_killed() {
    let mut g = Guarded::new("", "");
    g.start_application();
    g.start_guard();
    g.wait_state("healthy");
    g.set("broken");
    kill_process(g.pid("pid").unwrap(), Signal::KILL).unwrap();
    g.wait_news("handed-over");
    let expected = ["start", "stop", "start", "stop", "start", "stop", "failover dead=yes role=active with an argument"];
    assert_eq!(g.ran(), expected);
    g.wait_looks(4);
    g.kill_guard();
    g.start_guard();
    g.wait_looks(5);
    assert_eq!(g.ran(), expected);
    assert_eq!(g.guard()["state"], "escalated");
    // A person has looked.
    g.run(&["guard", "--resume"]).expect(2, "isn't paused");
    g.run(&["guard", "--pause"]).expect_code(0);
    g.wait_state("paused");
    g.clear("broken");
    g.run(&["guard", "--resume"]).expect_code(0);
    g.wait_state("healthy");
    assert_eq!(g.ran()[expected.len()..], ["stop", "start"]);
}

#[test]
fn maintenance_starting_and_a_pause_are_left_alone() {
    let mut g = Guarded::new("start_limit_seconds = 3\n", "");
    g.start_application();
    g.start_guard();
    for (says, state) in [("MAINTENANCE", "maintenance"), ("STARTING", "starting"), ("FIRST_RUN", "first-run"), ("ODD", "unknown-state")] {
        g.say(says);
        g.wait_state(state);
        g.wait_looks(5);
    }
    g.run(&["guard", "--pause"]).expect_code(0);
    g.wait_state("paused");
    g.say("hang");
    g.wait_looks(5);
    g.wait_news("unknown-state");
    assert_eq!(g.ran(), ["start"]);
    assert_eq!(g.news(), ["first-run", "unknown-state"]);
}

#[test]
fn a_git_child_that_survives_the_kill_prevents_the_start_and_is_named() {
    // As many as it takes until the orphan is gone.
    let mut g = Guarded::new("attempts = 1000\n", "");
    g.set("orphan");
    g.start_application();
    g.start_guard();
    g.wait_state("healthy");
    g.say("hang");
    g.wait_news("attempt-failed");
    // The next attempt may have begun.
    let ran = g.ran();
    assert!(ran[..2] == ["start", "stop"] && ran[2..].iter().all(|ran| ran == "stop"), "{ran:?}");
    let orphan = g.pid("orphan.pid").unwrap();
    let message = g.message("attempt-failed");
    assert!(message.contains(&format!("pid {} (", orphan.as_raw_nonzero())) && message.contains("/git 600"), "{message}");
    let proof = g.run(&["application", "prove-dead"]).expect_code(1);
    assert!(proof.out.contains("works in"), "{proof:?}");
    g.say("RUNNING");
    kill_process(orphan, Signal::KILL).unwrap();
    g.wait_state("healthy");
    assert_eq!(g.ran().last().map(String::as_str), Some("start"));
    assert!(!g.ran().iter().any(|ran| ran.starts_with("failover")));
}

#[test]
fn without_proof_of_death_only_a_fence_that_succeeds_lets_go_on() {
    for (fence, expected) in [("exit 1", "withheld"), ("echo fenced >> $d/ran", "handed-over")] {
        let mut g = Guarded::new("attempts = 1\n", "");
        let path = g.script("fence", fence);
        let text = std::fs::read_to_string(g.host().config()).unwrap() + &format!("fence_self = {{ command = [{path:?}] }}\n");
        std::fs::write(g.host().config(), text).unwrap();
        g.set("orphan");
        g.start_application();
        g.start_guard();
        g.wait_state("healthy");
        g.say("hang");
        g.wait_news(expected);
        let fenced = ["start", "stop", "stop", "fenced", "failover dead=no role=active with an argument"];
        assert_eq!(g.ran(), if expected == "withheld" { &fenced[..3] } else { &fenced[..] });
    }
}

#[test]
fn a_hook_that_hangs_is_killed_at_its_limit() {
    let mut g = Guarded::new("", "");
    g.script("stop", "echo stop >> $d/ran\ntrap '' TERM\nsetsid sleep 611 & echo $! > $d/orphan.pid\nwhile :; do sleep 612; done");
    g.start_application();
    g.start_guard();
    g.wait_state("healthy");
    g.say("hang");
    until("it is started again", || g.ran().len() >= 3);
    g.say("RUNNING");
    g.wait_state("healthy");
    assert_eq!(g.ran(), ["start", "stop", "start"]);
    until("what it hid is gone", || !lives(g.pid("orphan.pid").unwrap()));
}

#[test]
fn a_host_that_isnt_the_active_is_never_acted_on() {
    let g = Guarded::new("", "");
    let active = std::fs::read_to_string(g.host().config()).unwrap();
    let more = &active[active.find("\n[guard]").unwrap()..];
    let standby = &g.pair.standby;
    std::fs::write(standby.config(), std::fs::read_to_string(standby.config()).unwrap() + more).unwrap();
    standby.run(&["application", "start"]).expect(4, "standby, not the active");
    let _guard = Daemon::start(standby, "guard");
    let looks = || {
        let ran = standby.run(&["guard", "--status", "--json"]);
        if ran.code == 0 { ran.json()["looks"].as_u64().unwrap() } else { 0 }
    };
    until("the guard has looked", || looks() >= 6);
    assert_eq!(standby.run(&["guard", "--status", "--json"]).json()["state"], "inactive");
    assert_eq!(g.ran(), Vec::<String>::new());
}

#[test]
fn by_hand_it_is_stopped_for_certain_and_started_once() {
    let mut g = Guarded::new("", "");
    g.run(&["application", "status"]).expect_code(3);
    g.set("deaf");
    g.start_application();
    g.start_application();
    assert_eq!(g.ran(), ["start"]);
    assert_eq!(g.run(&["application", "status", "--json"]).expect_code(0).json()["state"], "healthy");
    g.run(&["application", "prove-dead"]).expect_code(1);
    g.start_guard();
    g.wait_state("healthy");
    g.run(&["application", "stop"]).expect(2, "--pause");
    g.run(&["guard", "--pause"]).expect_code(0);
    g.run(&["application", "stop"]).expect_code(0);
    g.run(&["application", "prove-dead"]).expect_code(0);
    assert!(g.run(&["hook", "failover"]).expect_code(0).out.is_empty());
    g.run(&["hook", "route"]).expect(2, "hooks.route isn't configured");
    assert_eq!(g.ran()[1..], ["stop", "failover dead= role=active with an argument"]);
}

#[test]
fn nothing_is_started_where_the_home_isnt_mounted() {
    let g = Guarded::new("", "");
    g.say("RUNNING");
    let (home, away) = (&g.pair.active.home, g.dir.join("away"));
    std::fs::rename(home, &away).unwrap();
    std::fs::create_dir(home).unwrap();
    g.run(&["application", "start"]).expect(5, "is the right filesystem mounted?");
    assert_eq!(g.ran(), Vec::<String>::new());
    std::fs::remove_dir(home).unwrap();
    std::fs::rename(&away, home).unwrap();
    g.start_application();
}

#[test]
fn load_balancers_are_sent_to_the_healthy_active_only() {
    let mut g = Guarded::new("", "");
    let health = |g: &Guarded, host: &Host| {
        let ports = [free_port(), free_port()];
        let section = format!("\n[health]\nlisten = \"127.0.0.1:{}\"\nagent_listen = \"127.0.0.1:{}\"\n", ports[0], ports[1]);
        std::fs::write(host.config(), std::fs::read_to_string(host.config()).unwrap() + &section).unwrap();
        let daemon = Daemon::start(host, "health");
        until("the endpoint answers", || !g.ask(ports[1], "").is_empty());
        (daemon, ports)
    };
    let (_active, [http, agent]) = health(&g, &g.pair.active);
    let (_standby, [other, other_agent]) = health(&g, &g.pair.standby);
    let get = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    assert!(answer(&g, http, "OPTIONS / HTTP/1.0\r\n\r\n").starts_with("HTTP/1.1 200 OK\r\n"));
    assert!(answer(&g, other, get).contains("503 Service Unavailable"));
    assert!(answer(&g, other, get).ends_with("{\"reason\":\"this host is standby\",\"up\":false}\n"));
    assert_eq!((answer(&g, agent, ""), answer(&g, other_agent, "")), ("ready up\n".into(), "ready down #this host is standby\n".into()));
    assert!(answer(&g, http, "HEAD / HTTP/1.1\r\n\r\n").ends_with("\r\n\r\n"));
    assert!(answer(&g, http, "POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    assert!(answer(&g, http, "SSH-2.0\r\n\r\n").starts_with("HTTP/1.1 400"));
    g.start_application();
    g.start_guard();
    g.wait_state("healthy");
    assert!(answer(&g, http, get).starts_with("HTTP/1.1 200 OK"));
    g.say("MAINTENANCE");
    g.wait_state("maintenance");
    assert!(answer(&g, http, get).starts_with("HTTP/1.1 503"));
    assert_eq!(answer(&g, agent, ""), "maint #the application is in maintenance\n");
    g.run(&["health", "--once"]).expect_code(1);
    g.say("RUNNING");
    g.wait_state("healthy");
    assert_eq!(g.run(&["health", "--once"]).expect_code(0).out, "up\n");
    // As a home looks that isn't mounted.
    let marker = g.pair.active.home.join(".coldspare/root");
    std::fs::rename(&marker, marker.with_extension("away")).unwrap();
    assert!(answer(&g, http, get).starts_with("HTTP/1.1 503"));
    assert!(g.run(&["health", "--once"]).expect_code(1).out.contains("is its filesystem mounted?"));
    std::fs::rename(marker.with_extension("away"), &marker).unwrap();
    g.run(&["health", "--once"]).expect_code(0);
}

#[test]
fn check_names_hooks_that_others_could_change() {
    use std::os::unix::fs::PermissionsExt;
    let g = Guarded::new("", "");
    let hooks = || {
        let findings = g.run(&["check", "--json"]).json()["findings"].clone();
        findings.as_array().unwrap().iter().filter(|f| f["what"] == "hook stop").map(|f| f["detail"].to_string()).collect::<String>()
    };
    let mode = |mode| std::fs::set_permissions(g.dir.join("stop"), std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o757);
    assert!(hooks().contains("writable by everybody"), "{}", hooks());
    mode(0o644);
    assert!(hooks().contains("isn't executable"), "{}", hooks());
    g.run(&["check"]).expect_code(2);
    mode(0o755);
    assert!(!hooks().contains("everybody") && hooks().contains("stop"), "{}", hooks());
}

#[test]
fn the_resource_agent_passes_ocf_tester() {
    if !succeeds("ocf-tester", &["-h"]) || !succeeds("xmllint", &["--version"]) {
        return println!("skipped: ocf-tester or xmllint is missing");
    }
    let g = Guarded::new("", "");
    g.say("RUNNING");
    let agent = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/ocf/coldspare");
    let parameters = [
        format!("binary={}", g.host().program().get_program().display()),
        format!("config={}", g.host().config().display()),
        format!("log={}", g.dir.join("agent.log").display()),
    ];
    let mut tester = Command::new("ocf-tester");
    tester.args(["-n", &format!("test-{}", std::process::id())]).env("HA_RSCTMP", &g.dir);
    for parameter in &parameters {
        tester.args(["-o", parameter]);
    }
    let ran = run(tester.arg(&agent)).expect_code(0);
    assert!(ran.out.contains("passed all tests"), "{ran:#?}");
    let commands = g.ran();
    assert!(commands.len() >= 4 && commands.iter().step_by(2).all(|c| c == "start"), "{commands:?}");
}

/// A daemon that is killed with the test.
pub(crate) struct Daemon(Child);

impl Daemon {
    pub(crate) fn start(host: &Host, command: &str) -> Daemon {
        let log = host.etc.join(format!("{command}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log).unwrap();
        let mut daemon = host.program();
        daemon.arg(command).arg("--config").arg(host.config());
        Daemon(daemon.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The answer of the health endpoint: on a host that stands still it may hang up without one.
#[track_caller]
fn answer(g: &Guarded, port: u16, request: &str) -> String {
    let mut answer = String::new();
    until("the endpoint answers", || {
        answer = g.ask(port, request);
        !answer.is_empty()
    });
    answer
}

/// Whether it has not ended, noticed or not by its parent.
fn lives(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}
