//! Who counts as alive: on made-up hosts, and on this one.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

fn seen(pid: i32, parent: i32, command: &str) -> Seen {
    let arguments = command.split(' ').map(|a| a.as_bytes().to_vec()).collect();
    let name = command.split(' ').next().unwrap().rsplit('/').next().unwrap().to_string();
    let info = ProcessInfo { pid, parent, started_ticks: 100, uid: 0, name, arguments, is_zombie: false, is_kernel: false };
    Seen { info, cgroups: Vec::new(), program: Some("/usr/bin/some".into()), uses: Some(Vec::new()) }
}

fn using(mut process: Seen, how: Use, path: &str) -> Seen {
    process.uses.as_mut().unwrap().push((how, path.into()));
    process
}

fn host(processes: Vec<Seen>) -> Snapshot {
    Snapshot { processes, me: 1000, program: "/usr/bin/coldspare".into(), ..Snapshot::default() }
}

fn search() -> Search {
    Search { roots: vec!["/srv/home".into()], patterns: vec!["-Dbitbucket.home=/srv/home".into()], ports: vec![7990], ..Search::default() }
}

#[track_caller]
fn check(seen: &Snapshot, search: &Search, expected: &[(i32, Kin)], doubts: usize) {
    let proof = judge(seen, search);
    let found: Vec<(i32, Kin)> = proof.survivors.iter().map(|s| (s.pid, s.kin)).collect();
    assert_eq!((found.as_slice(), proof.doubts.len()), (expected, doubts), "{proof}");
    assert_eq!(proof.is_dead(), expected.is_empty() && doubts == 0);
}

#[test]
fn a_host_without_the_application_is_no_evidence_of_life() {
    let others = vec![using(seen(7, 1, "/bin/sh"), Use::WorkingDirectory, "/srv/home2"), seen(8, 1, "/usr/bin/java -jar x")];
    check(&host(others), &search(), &[], 0);
}

#[test]
fn children_of_the_application_are_of_it_and_orphans_are_found_by_what_they_use() {
    let java = seen(10, 1, "/opt/java -Dbitbucket.home=/srv/home org.Main");
    let git = seen(11, 10, "/usr/bin/git upload-pack");
    let deeper = seen(12, 11, "/usr/bin/git pack-objects");
    let orphan = using(seen(13, 1, "/usr/bin/git gc"), Use::WorkingDirectory, "/srv/home/shared/data/repositories/1");
    let mapped = using(seen(14, 1, "/opt/search"), Use::Mapped, "/srv/home/search/data/x");
    let own = [(10, Kin::Application), (11, Kin::Application), (12, Kin::Application)];
    check(&host(vec![java, git, deeper]), &search(), &own, 0);
    check(&host(vec![orphan.clone(), mapped]), &search(), &[(13, Kin::User), (14, Kin::User)], 0);
    let ignoring = Search { ignore: vec!["git".into()], ..search() };
    check(&host(vec![orphan]), &ignoring, &[], 0);
}

#[test]
fn what_cant_be_examined_counts() {
    let hidden = Seen { uses: None, ..seen(20, 1, "/usr/bin/what") };
    check(&host(vec![hidden.clone()]), &search(), &[], 1);
    let first = Seen { info: ProcessInfo { pid: 1, ..hidden.info }, ..hidden };
    check(&host(vec![first.clone()]), &search(), &[], 0);
    check(&Snapshot { main: Some(1), ..host(vec![first]) }, &search(), &[], 1);
}

#[test]
fn coldspare_itself_does_not_count() {
    let mut send = using(seen(30, 1, "/usr/bin/coldspare send -Dbitbucket.home=/srv/home"), Use::Open, "/srv/home/shared");
    send.program = Some("/usr/bin/coldspare (deleted)".into());
    let me = using(seen(1000, 1, "/x"), Use::Open, "/srv/home");
    check(&host(vec![send, me]), &search(), &[], 0);
}

#[test]
fn the_unit_and_the_pid_file_name_the_application() {
    let mut of_unit = seen(40, 1, "/opt/a");
    of_unit.cgroups = vec!["/system.slice/atlbitbucket.service/inner".into()];
    let mut of_another = seen(41, 1, "/opt/b");
    of_another.cgroups = vec!["/system.slice/atlbitbucket.service2".into()];
    let by_unit = Search { unit: Some("atlbitbucket".into()), ..search() };
    check(&host(vec![of_unit.clone(), of_another.clone()]), &by_unit, &[(40, Kin::Application)], 0);
    let by_file = Snapshot { main: Some(41), ..host(vec![of_unit, of_another]) };
    check(&by_file, &search(), &[(41, Kin::Application)], 0);
}

#[test]
fn ports_and_locks_tell_of_their_holders_or_of_somebody() {
    let listeners = vec![Listener { port: 7990, inode: 5 }, Listener { port: 22, inode: 6 }];
    let holder = using(seen(50, 1, "/opt/other"), Use::Open, "socket:[5]");
    check(&Snapshot { listeners: listeners.clone(), ..host(vec![holder]) }, &search(), &[(50, Kin::User)], 0);
    check(&Snapshot { listeners, ..host(vec![]) }, &search(), &[], 1);
    let lock_files = vec![(PathBuf::from("/srv/home/.lock"), (8, 1), 77)];
    let lock = |pid, ino| Snapshot {
        locks: vec![LockInfo { pid, dev: (8, 1), ino }],
        lock_files: lock_files.clone(),
        ..host(vec![seen(60, 1, "/x")])
    };
    check(&lock(60, 77), &search(), &[(60, Kin::User)], 0);
    check(&lock(61, 77), &search(), &[], 1);
    check(&lock(60, 78), &search(), &[], 0);
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn spawn(command: &mut Command) -> Killed {
    Killed(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
}

fn until(mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn real_processes_are_found_and_only_the_applications_own_are_killed() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let mark = format!("mark-of-{}", root.display());
    let search = Search { roots: vec![root.clone()], patterns: vec![mark.clone()], ..Search::default() };
    let others = || judge(&look(&search).unwrap(), &search).survivors;
    assert_eq!(others(), []);
    assert_eq!(main_process(&search).unwrap(), Process::Gone);
    let mut main = spawn(Command::new("/bin/sh").args(["-c", "sleep 311; true", &mark]));
    let user = spawn(Command::new("/bin/sleep").arg("312").current_dir(&root));
    until(|| others().len() == 3);
    let found = prove(&search).unwrap();
    assert!(!found.is_dead());
    assert!(found.to_string().contains("works in"), "{found}");
    assert!(matches!(main_process(&search).unwrap(), Process::Alive { .. }));
    kill(&search).unwrap();
    main.0.wait().unwrap();
    assert_eq!(others().iter().map(|s| s.pid).collect::<Vec<_>>(), [i32::try_from(user.0.id()).unwrap()], "{:?}", others());
    drop(user);
    let last = prove(&search).unwrap();
    assert!(last.is_dead(), "{last}");
}
