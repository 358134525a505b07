// A js-libp2p node that echoes, dials us, and asks us: the other side of tests/integration/test_p2p_interop.py.
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { generateKeyPair } from '@libp2p/crypto/keys'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

// libp2p 3 asks for node 22, but this is all that node 20 lacks
Promise.withResolvers ??= () => {
  const all = {}
  all.promise = new Promise((resolve, reject) => Object.assign(all, { resolve, reject }))
  return all
}

const node = await createLibp2p({
  privateKey: await generateKeyPair('secp256k1'),
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()]
})
const bytes = (part) => part instanceof Uint8Array ? part : part.subarray()

async function send (stream, data) {
  for (let at = 0; at < data.length; at += 50000) {
    if (!stream.send(data.subarray(at, at + 50000))) await stream.onDrain()
  }
}

await node.handle('/test/echo/1', async (stream) => {
  for await (const part of stream) await send(stream, bytes(part))
  await stream.close()
})
await node.handle('/test/reset/1', async (stream) => {
  for await (const _ of stream) break
  stream.abort(new Error('as asked'))
})

const target = multiaddr(process.argv[2])
await node.dial(target)
console.log(JSON.stringify(node.getMultiaddrs()[0].toString()))

for await (const _ of createInterface({ input: process.stdin })) {
  let asked = 0
  for (const size of [1, 65519, 65536, 3000000]) {
    const stream = await node.dialProtocol(target, '/test/echo/1')
    const data = new Uint8Array(size).map((_, at) => at * 31 % 251)
    const answer = []
    const reading = (async () => { for await (const part of stream) answer.push(Buffer.from(bytes(part))) })()
    await send(stream, data)
    await stream.close()
    await reading
    if (Buffer.concat(answer).equals(Buffer.from(data))) asked++
  }
  const stream = await node.dialProtocol(target, '/test/reset/1')
  stream.send(new Uint8Array([1]))
  let reset = false
  try { for await (const _ of stream); } catch { reset = true }
  console.log(JSON.stringify({ asked, reset: reset || stream.status === 'reset' }))
}
