//! `bootcache web`: the controller's lists as a page in a browser.

use std::net::SocketAddr;
use std::process::ExitCode;

use bootcache::web::Web;
use tokio_util::sync::CancellationToken;

use super::remote::ControllerArgs;
use super::signals::Ending;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the page listens; on this host alone. Port 0: any that is free
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:7680")]
    listen: SocketAddr,
    #[command(flatten)]
    controller: ControllerArgs,
}

pub(crate) fn run(globals: &super::Globals, args: &Args) -> anyhow::Result<ExitCode> {
    super::block_on(async {
        let (target, security) = args.controller.target(globals)?;
        let mut ending = Ending::listen()?;
        let web = Web::bind(args.listen, target, security).await?;
        println!("ready: open {}", web.url());
        let cancel = CancellationToken::new();
        let mut serving = std::pin::pin!(web.run(cancel.clone()));
        tokio::select! {
            result = &mut serving => result?,
            () = ending.wait() => cancel.cancel(),
        }
        // A browser that keeps its connection open is not waited for.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(1), serving).await;
        Ok(ExitCode::SUCCESS)
    })
}
