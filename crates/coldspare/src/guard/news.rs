//! Tells people: by the log, by a command, by a webhook; in order, beside the rest.

use std::collections::VecDeque;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use coldspare_failover::health::{self, Url};
use coldspare_failover::ladder::News;
use serde_json::{Value, json};

use crate::active::rfc3339;
use crate::application::Application;
use crate::config::HookName;

/// LIMIT: news that wait to be told; more are only in the log.
const QUEUE: usize = 64;
/// LIMIT: news that the status shows.
const SHOWN_MAX: usize = 20;
/// How long a webhook may take.
const WEBHOOK_LIMIT: Duration = Duration::from_secs(10);

/// Tells people what the ladder says.
pub(super) struct Herald {
    queue: SyncSender<(&'static str, String, String)>,
    shown: VecDeque<Value>,
    /// Why the last one could not be told.
    trouble: Arc<Mutex<Option<String>>>,
}

impl Herald {
    pub(super) fn start(application: Arc<Application>) -> Herald {
        let (queue, waiting) = sync_channel::<(&str, String, String)>(QUEUE);
        let trouble: Arc<Mutex<Option<String>>> = Arc::default();
        let told = trouble.clone();
        std::thread::spawn(move || {
            for (event, message, time) in waiting {
                let failed = send(&application, event, &message, &time).err();
                if let Some(why) = &failed {
                    tracing::error!(event, error = %why, "people could not be told");
                }
                *told.lock().unwrap_or_else(PoisonError::into_inner) = failed;
            }
        });
        Herald { queue, shown: VecDeque::new(), trouble }
    }

    pub(super) fn tell(&mut self, news: News) {
        let (event, message) = (news.word(), news.to_string());
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let time = rfc3339(u64::try_from(since.as_millis()).unwrap_or_default());
        if news.is_grave() {
            tracing::error!(event, "{message}");
        } else {
            tracing::info!(event, "{message}");
        }
        self.shown.push_back(json!({"time": time, "event": event, "message": message}));
        if self.shown.len() > SHOWN_MAX {
            self.shown.pop_front();
        }
        if let Err(TrySendError::Full(_)) = self.queue.try_send((event, message, time)) {
            tracing::error!(event, "too much waits to be told; this one is only here");
        }
    }

    pub(super) fn shown(&self) -> Vec<&Value> {
        self.shown.iter().collect()
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn send(application: &Application, event: &str, message: &str, time: &str) -> Result<(), String> {
    let variables = [("COLDSPARE_EVENT".to_string(), event.to_string()), ("COLDSPARE_MESSAGE".into(), message.into())];
    let by_command = match application.run_hook(HookName::Notify, &variables) {
        Ok(Some(ran)) => ran.check().map_err(|why| format!("hooks.notify: {why}")),
        Ok(None) => Ok(()),
        Err(failure) => Err(failure.message),
    };
    let by_webhook = match &application.guard().webhook {
        Some(url) => post(url, event, message, time).map_err(|why| format!("guard.webhook {url}: {why}")),
        None => Ok(()),
    };
    by_command.and(by_webhook)
}

fn post(url: &str, event: &str, message: &str, time: &str) -> Result<(), String> {
    let url: Url = url.parse()?;
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let body = json!({"event": event, "message": message, "time": time, "host": host, "text": format!("{host}: {message}")});
    match health::request(&url, "POST", Some(&body.to_string()), WEBHOOK_LIMIT) {
        Ok(response) if (200..300).contains(&response.status) => Ok(()),
        Ok(response) => Err(format!("HTTP {}", response.status)),
        Err(e) => Err(e.to_string()),
    }
}
