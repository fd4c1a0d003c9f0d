// Browsers start no Worker for a page that is opened from the disk. Search then runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      this.ready = new Promise(resolve => {
        inside.importScripts = (...names) => names.reduce((done, name) => done.then(() => this.load(name)), Promise.resolve())
        inside.postMessageToPage = data => {
          const event = new MessageEvent("message", { data })
          this.onmessage?.(event)
          this.dispatchEvent(event)
        }
        this.load = name => new Promise((loaded, failed) => {
          const script = inside.document.createElement("script")
          Object.assign(script, { src: name, onload: loaded, onerror: failed })
          inside.document.body.append(script)
        })
        inside.__receive = inside.dispatchEvent.bind(inside)
        inside.postMessage = inside.postMessageToPage
        this.load(url).then(resolve)
      })
      this.inside = inside
    }
    postMessage(data) {
      this.ready.then(() => this.inside.__receive(new MessageEvent("message", { data })))
    }
    terminate() {}
  }
}
