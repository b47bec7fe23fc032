//! The runbook's pages, followed literally: the commands are taken from the page, in its order.

use std::collections::VecDeque;
use std::fs;
use std::path::Path;

use crate::git::{self, commit, git_ok, push};
use crate::pair::{Host, Pair, Ran, until};
use crate::roles::{contents, quarantine, role, until_active};

const REPOSITORY: &str = "shared/data/repositories/1";

/// The commands of a section that are still to be given.
pub(crate) struct Page(VecDeque<String>);

impl Page {
    /// Those in the text of a section; what its tables say is for when something goes wrong.
    pub(crate) fn of(title: &str) -> Page {
        let runbook = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations/runbook.md")).unwrap();
        let (_, section) = runbook.split_once(&format!("\n### {title}\n")).unwrap_or_else(|| panic!("no section {title}"));
        let section = section.split("\n#").next().unwrap();
        let text: Vec<&str> = section.lines().filter(|line| !line.starts_with('|')).map(str::trim).collect();
        let text = text.join(" ");
        let code = text.split('`').skip(1).step_by(2);
        Page(code.filter(|code| code.starts_with("coldspare ") || code.starts_with("git ")).map(String::from).collect())
    }

    /// The next command, which begins with `beginning`; its words without the program.
    #[track_caller]
    fn next(&mut self, beginning: &str) -> Vec<String> {
        let next = self.0.pop_front().unwrap_or_else(|| panic!("the page ends before {beginning}"));
        assert!(next.starts_with(beginning), "the page says {next:?}, not {beginning:?}");
        next.split(' ').skip(1).map(String::from).collect()
    }

    /// Gives the next command on a host.
    #[track_caller]
    pub(crate) fn give(&mut self, beginning: &str, host: &Host) -> Ran {
        self.give_with(beginning, host, &[])
    }

    /// As [`Page::give`], with words that stand for others on the page.
    #[track_caller]
    fn give_with(&mut self, beginning: &str, host: &Host, words: &[(&str, &str)]) -> Ran {
        let given = self.next(&format!("coldspare {beginning}"));
        let meant = |word: &String| words.iter().find(|(on_page, _)| on_page == word).map_or(word.clone(), |(_, meant)| meant.to_string());
        let meant: Vec<String> = given.iter().map(meant).collect();
        host.run(&meant.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// As [`Page::give`], for `coldspare run`, which goes on.
    #[track_caller]
    pub(crate) fn start(&mut self, host: &mut Host) {
        assert_eq!(self.next("coldspare run"), ["run"]);
        host.start();
    }

    /// What the page has for other cases than this.
    #[track_caller]
    pub(crate) fn skip(&mut self, beginning: &str) {
        self.next(&format!("coldspare {beginning}"));
    }

    #[track_caller]
    pub(crate) fn end(&self) {
        assert!(self.0.is_empty(), "the page says more: {:?}", self.0);
    }

    /// Fetches a branch from a bundle in a quarantine, as the page has it.
    #[track_caller]
    pub(crate) fn fetch(&mut self, clone: &Path, bundle: &Path, branch: &str) {
        let words = self.next("git fetch");
        let words = words.iter().map(|word| word.replace("PATH.bundle", &bundle.to_string_lossy()).replace("NAME", branch));
        let words: Vec<String> = words.collect();
        git_ok(clone, &words.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// A pair whose hosts have a fence command, with a repository and its clone.
fn pair() -> Pair {
    let mut pair = Pair::to_run();
    for host in [&pair.active, &pair.standby] {
        host.configure("[hooks]\nfence = { command = [\"/bin/true\"] }\n");
    }
    pair.standby.start();
    pair.active.start();
    git::init_bare(&pair.active.home.join(REPOSITORY));
    git::clone(&pair.active.home.join(REPOSITORY), &pair.dir.path().join("clone"));
    pair
}

fn push_to(pair: &Pair, host: &Host, branch: &str) {
    let clone = pair.dir.path().join("clone");
    git_ok(&clone, &["remote", "set-url", "origin", &host.home.join(REPOSITORY).to_string_lossy()]);
    commit(&clone, "file", &format!("pushed to {branch} of {}", host.home.display()));
    push(&clone, &[&format!("HEAD:{branch}")]);
}

#[test]
fn a_planned_switchover_by_the_page() {
    let pair = pair();
    push_to(&pair, &pair.active, "main");
    pair.active.run(&["checkpoint"]).expect_code(0);
    let mut page = Page::of("Planned switchover");
    // No guard runs here; the drill has one.
    ["guard --pause", "application stop", "guard --resume"].iter().for_each(|command| page.skip(command));
    page.give("switchover", &pair.active).expect_code(0);
    until_active(&pair.standby);
    let said = page.give("status", &pair.standby).expect_code(0).out;
    assert!(said.lines().any(|line| line.split_whitespace().eq(["role", "active"])), "{said}");
    push_to(&pair, &pair.standby, "main");
    page.give("checkpoint", &pair.standby).expect_code(0);
    pair.assert_equal();

    // In two steps, and back.
    page.give("demote", &pair.standby).expect_code(0);
    assert_eq!(role(&pair.standby), "handover");
    page.give("promote", &pair.active).expect_code(0);
    page.end();
    until_active(&pair.active);
    pair.active.run(&["checkpoint", "--timeout", "80s"]).expect_code(0);
    pair.assert_equal();
}

#[test]
fn a_drill_on_a_copy_by_the_page() {
    let pair = pair();
    push_to(&pair, &pair.active, "main");
    pair.active.run(&["checkpoint"]).expect_code(0);
    let points = pair.standby.run(&["points", "--json"]).expect_code(0).json();
    let point = points["points"].as_array().unwrap().last().unwrap()["point"].to_string();
    let copy = pair.dir.path().join("copy");
    let mut page = Page::of("Drill");
    page.give_with("export", &pair.standby, &[("N", &point), ("DIR", &copy.to_string_lossy())]).expect_code(0);
    page.end();
    // Clones and pushes there, while replication goes on.
    let (there, clone) = (copy.join("home").join(REPOSITORY), pair.dir.path().join("of-the-copy"));
    git::clone(&there, &clone);
    let id = commit(&clone, "file", "pushed to the copy");
    push(&clone, &["HEAD:main"]);
    git::assert_clean(&there);
    push_to(&pair, &pair.active, "meanwhile");
    pair.active.run(&["checkpoint"]).expect_code(0);
    fs::remove_dir_all(&copy).unwrap();
    pair.assert_equal();
    assert_ne!(git::tip(&pair.standby.home.join(REPOSITORY), "main"), id);
    pair.standby.run(&["verify", "--deep", "--git"]).expect_code(0);
}

#[test]
fn a_failover_and_a_fail_back_by_their_pages() {
    let mut pair = pair();
    push_to(&pair, &pair.active, "main");
    pair.active.run(&["checkpoint"]).expect_code(0);
    until("the standby has noted as of when it is", || pair.standby.state().join("as-of").exists());
    pair.standby.kill();
    push_to(&pair, &pair.active, "lost");
    pair.active.write("shared/config/lost", "never replicated");
    pair.active.kill();
    pair.standby.start();

    let mut page = Page::of("Failover");
    page.give("failover", &pair.standby).expect_code(0);
    page.skip("promote --fenced-by COMMAND");
    page.end();
    until_active(&pair.standby);
    git_ok(&pair.dir.path().join("clone"), &["reset", "-q", "--hard", "HEAD~1"]);
    push_to(&pair, &pair.standby, "main");

    let before = contents(&pair.active.home);
    let mut page = Page::of("Fail-back");
    page.give("run", &pair.active).expect(4, "fenced");
    page.give("demote", &pair.active).expect_code(0);
    assert_eq!(contents(&pair.active.home), before);
    page.start(&mut pair.active);
    page.give("checkpoint", &pair.standby).expect_code(0);
    pair.assert_equal();
    let kept = quarantine(&pair.active.home);
    assert!(fs::read_to_string(kept.join("LIST")).unwrap().contains("\"shared/config/lost\""));
    until("the bundle is made", || kept.join("bundles/LIST").exists());
    let again = pair.dir.path().join("again");
    git::clone(&pair.standby.home.join(REPOSITORY), &again);
    page.fetch(&again, &kept.join("bundles").join(format!("{}.bundle", REPOSITORY.replace('/', "%"))), "lost");
    page.end();
    push(&again, &["lost"]);
    fs::remove_dir_all(&kept).unwrap();
    pair.standby.run(&["checkpoint"]).expect_code(0);
    pair.assert_equal();
    assert_eq!(git::tip(&pair.active.home.join(REPOSITORY), "lost"), git::tip(&again, "lost"));
}
